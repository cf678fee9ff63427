"""The base module: what users subclass."""

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from dflows.cli.noise import quiet
from dflows.errors import UserError
from lightning_modules import BaseModule, Optimization
from lightning_modules.base import DEFAULT_OPTIMIZATION

K, D = 3, 4


class Unigram(BaseModule):
    """The least that a user writes."""

    def __init__(self, optimization=DEFAULT_OPTIMIZATION):
        super().__init__(optimization)
        self.logits = nn.Parameter(torch.tensor([0.5, 0.0, -0.5]))
        self.body = nn.Sequential(nn.Embedding(K, 2), nn.LayerNorm(2), nn.Linear(2, 2))

    def evaluate_objective(self, batch):
        unused = sum(parameter.sum() for parameter in self.body.parameters())
        return self.log_prob(batch) + 0 * unused

    def log_prob(self, batch):
        return self.logits.log_softmax(-1)[self.indices_of(batch)].sum(-1)

    def sample(self, num_samples, *, length=None, temperature=1.0, generator=None, method="levels"):
        probs = (self.logits / temperature).softmax(-1).expand(num_samples, -1)
        return probs.multinomial(length or D, replacement=True, generator=generator)

    def base_parameters(self):
        return [self.logits]


class Silent(Unigram):
    """Steps without a trainer, who keeps the log."""

    def log(self, *arguments, **options):
        pass


class Watch(Callback):
    """Notes learning rates, and the base, after every step."""

    def __init__(self):
        self.rates, self.base, self.randomness = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.base.append(module.logits.detach().clone())
        self.randomness.append(torch.rand(()).item())


def batches(number, rows=2, length=D):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(K, (rows, length), generator=generator) for _ in range(number)]


def fit(module, folder, *, steps=6, watch=None, **options):
    quiet()
    watch = watch or Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
        default_root_dir=folder,
        **options,
    )
    loader = DataLoader(batches(10), batch_size=None)
    trainer.fit(module, loader, DataLoader(batches(3), batch_size=None))
    return trainer, watch


class TestOptimization:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("learning_rate", 0.0),
            ("learning_rate", float("nan")),
            ("base_learning_rate", -1.0),
            ("weight_decay", -0.1),
            ("warmup_steps", -1),
            ("hold_base_steps", -1),
            ("betas", (0.9, 1.0)),
            ("schedule", "exponential"),
            ("cycles", 0),
            ("cycles", 2),
        ],
    )
    def test_bad_values_are_named(self, key, value):
        with pytest.raises(UserError, match=f"optimization.{key} is"):
            Optimization(**{key: value})

    @pytest.mark.parametrize(
        ("schedule", "factors"),
        [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0]), ("cosine", [1, 0.5, 0])],
    )
    def test_schedules(self, schedule, factors):
        settings = Optimization(schedule=schedule)
        found = [settings.factor(1000, progress) for progress in (0.0, 0.5, 1.0)]
        assert found == pytest.approx(factors)

    def test_warm_up(self):
        settings = Optimization(warmup_steps=4)
        assert [settings.factor(step, 0.0) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1, 1]

    @pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
    def test_a_cycle_is_a_whole_course(self, schedule):
        one = Optimization(schedule=schedule, warmup_steps=4)
        three = Optimization(schedule=schedule, warmup_steps=4, cycles=3)
        course = [one.factor(step, step / 20) for step in range(20)]
        assert [three.factor(step, step / 60) for step in range(60)] == pytest.approx(3 * course)
        assert three.factor(60, 1.0) == pytest.approx(one.factor(20, 1.0))


class TestOptimizer:
    def test_groups(self, tmp_path):
        settings = Optimization(learning_rate=0.1, base_learning_rate=0.2, weight_decay=0.3)
        trainer, _ = fit(Unigram(settings), tmp_path)
        module = trainer.lightning_module
        (optimizer,) = trainer.optimizers
        found = {
            id(parameter): (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        assert len(found) == len(list(module.parameters()))
        assert found[id(module.logits)] == (0.2, 0.0)
        assert found[id(module.body[2].weight)] == (0.1, 0.3)
        for parameter in (module.body[0].weight, module.body[1].weight, module.body[2].bias):
            assert found[id(parameter)] == (0.1, 0.0)

    def test_the_learning_rate_falls_to_the_end_of_the_training(self, tmp_path):
        settings = Optimization(learning_rate=1.0, warmup_steps=2, schedule="linear")
        _, watch = fit(Unigram(settings), tmp_path, steps=5)
        assert [rates[0] for rates in watch.rates] == pytest.approx([0.5, 0.8, 0.6, 0.4, 0.2])

    def test_the_learning_rate_falls_with_time(self, tmp_path):
        settings = Optimization(learning_rate=1.0, schedule="linear")
        _, watch = fit(
            Unigram(settings), tmp_path, steps=-1, max_time={"seconds": 1}, limit_val_batches=0
        )
        rates = [rates[0] for rates in watch.rates]
        assert rates[0] > 0.9
        assert rates[-1] < 0.1
        assert rates == sorted(rates, reverse=True)

    def test_a_schedule_needs_an_end(self, tmp_path):
        with pytest.raises(UserError, match=r"set trainer.max_steps or trainer.max_time"):
            fit(Unigram(Optimization(schedule="cosine")), tmp_path, steps=-1)

    def test_the_base_is_held(self, tmp_path):
        module = Unigram(Optimization(learning_rate=0.1, hold_base_steps=3))
        before = module.logits.detach().clone()
        _, watch = fit(module, tmp_path)
        held = [torch.equal(logits, before) for logits in watch.base]
        assert held == [True, True, True, False, False, False]

    @pytest.mark.parametrize("clip", [None, 1.0])
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
    def test_it_works_in_every_precision(self, tmp_path, precision, clip):
        run, watch = fit(Unigram(), tmp_path, precision=precision, gradient_clip_val=clip)
        (optimizer,) = run.optimizers
        assert optimizer.defaults["fused"] == (clip is None or "mixed" not in precision)
        assert not torch.equal(watch.base[0], watch.base[-1])


class TestSteps:
    def test_the_loss_is_in_nats_a_dimension(self):
        module = Silent()
        (batch,) = batches(1)
        expected = -module.log_prob(batch).mean() / D
        assert module.training_step(batch, 0).item() == pytest.approx(expected.item())
        longer = batch.repeat(1, 3)
        assert module.training_step(longer, 0).item() == pytest.approx(expected.item())

    def test_metrics_are_exact_over_unequal_batches(self, tmp_path):
        module = Unigram()
        data = [*batches(2, rows=3), *batches(1, rows=1, length=2)]
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        quiet()
        loader = DataLoader(data, batch_size=None)
        for split, run in (("valid", trainer.validate), ("test", trainer.test)):
            (result,) = run(module, loader, verbose=False)
            nats = -sum(module.log_prob(batch).sum().item() for batch in data)
            assert result[f"{split}_bpc"] == pytest.approx(nats / math.log(2) / 26, rel=1e-6)
            assert result[f"{split}_nats"] == pytest.approx(nats / 7, rel=1e-6)
            assert module.scores[split].characters == 26
            assert module.scores[split].examples == 7

    def test_the_seed_decides_what_is_drawn_in_a_step(self, tmp_path):
        randomness = []
        for seed, batch_of_validation in ((1, 3), (1, 1), (2, 3)):
            torch.manual_seed(seed)
            _, watch = fit(Unigram(), tmp_path, limit_val_batches=batch_of_validation)
            randomness.append(watch.randomness)
        assert randomness[0] == randomness[1]
        assert randomness[0] != randomness[2]
        assert len(set(randomness[0])) == 6

    def test_a_batch_may_have_a_context(self):
        indices, context = torch.zeros(2, D, dtype=torch.long), torch.ones(2, 1)
        assert BaseModule.indices_of((indices, context)) is indices
        assert BaseModule.context_of((indices, context)) is context
        assert BaseModule.context_of(indices) is None


def test_the_state_of_training_is_kept():
    module, other = Silent(), Silent()
    module.training_step(batches(1)[0], 0)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    again = {}
    other.on_save_checkpoint(again)
    assert again == checkpoint
    other.on_load_checkpoint({})
