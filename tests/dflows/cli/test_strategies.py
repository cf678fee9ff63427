"""Which strategies train, and what is said of those that do not."""

import pytest
from pytorch_lightning.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)

from dflows.cli.strategies import chosen_strategy
from dflows.errors import UserError
from lightning_modules import FullySharded
from tests.commands import run_here, small_config, write_text

SHARED_OUT = [
    *(name for name in StrategyRegistry if "deepspeed" in name),
    *("deepspeed_stage_9", "fsdp_cpu_offload", "model_parallel"),
    *(FSDPStrategy, ModelParallelStrategy),
]
OTHERS = ["xla", "xla_debug", "single_xla", "single_tpu", "colossalai", "horovod", "dpp", ""]


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_find_unused_parameters_true", "DDP"])
def test_names_of_lightning_stay(name):
    assert chosen_strategy(name) == name


def test_fsdp_is_that_of_dflows():
    assert isinstance(chosen_strategy("fsdp"), FullySharded)
    given = FullySharded(blocks=True)
    assert chosen_strategy(given) is given
    assert isinstance(chosen_strategy(DDPStrategy()), DDPStrategy)


@pytest.mark.parametrize(
    "given",
    [*SHARED_OUT, "deepspeed_stage_9", "model_parallel", FSDPStrategy, ModelParallelStrategy],
)
def test_others_that_share_out_are_refused_for_fsdp(given):
    with pytest.raises(UserError, match=r"^trainer\.strategy is .*: give fsdp, which shares out"):
        chosen_strategy(given if isinstance(given, str) else given())


@pytest.mark.parametrize("name", OTHERS)
def test_the_rest_is_refused_for_ddp(name):
    with pytest.raises(UserError, match=r"^trainer\.strategy is .*: give ddp, fsdp where"):
        chosen_strategy(name)


@pytest.mark.parametrize("name", ["deepspeed_stage_2", "colossalai"])
def test_a_run_says_so_in_one_line(tmp_path, capsys, name):
    config = small_config(tmp_path, write_text(tmp_path))
    code = run_here("fit", "--config", config, "--trainer.strategy", name)
    said = capsys.readouterr().err.splitlines()
    assert code == 1
    assert [line for line in said if "error" in line] == [said[-1]]
    assert said[-1].startswith(f"error: trainer.strategy is {name}, by which dflows does not train")
    assert not (tmp_path / "runs").exists()
