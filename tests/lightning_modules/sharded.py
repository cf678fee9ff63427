"""Small modules of every kind, and a run of one of them in one process or in several."""

import traceback
from functools import partial

import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins import MixedPrecision
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from dflows import flows
from dflows.backbones import LSTM, MADE, DilatedConvolution, LevelConvolution, Transformer
from dflows.bases import FactorizedBase
from dflows.cli.trainer import Trainer
from dflows.flow import DiscreteFlow
from dflows.latent import AutoregressivePrior, LatentFlow
from dflows.objectives import EndToEnd, Layerwise, Local, SampledPasses
from dflows.orderings import Parity, Strided
from lightning_modules import Auxiliary, FlowModule, LanguageModel, LatentFlowModule, Optimization

CLASSES, LENGTH, BATCH = 5, 16, 12
SETTINGS = Optimization(learning_rate=0.01, weight_decay=0.1, warmup_steps=2, schedule="cosine")


def text(number, seed=1):
    """Rows in which the next class is mostly the one after."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(CLASSES, (number, 1), generator=generator)
    noise = (torch.rand(number, LENGTH, generator=generator) < 0.2).long()
    return (starts + torch.arange(LENGTH) + noise.cumsum(1)) % CLASSES


def few_pass(backbone, objective=None, **options):
    flow = flows.stack(CLASSES, LENGTH, [Strided(4), Parity()], backbone)
    return FlowModule(flow, objective, SETTINGS, **options)


def lanes():
    lstm = partial(LSTM, width=8, hidden=12, ahead=4, dropout=0.1, weight_drop=0.2)
    flow = flows.language_model(CLASSES, LENGTH, lstm, ordering=Strided(4))
    return FlowModule(flow, EndToEnd(), SETTINGS)


def language_model(**options):
    transformer = partial(Transformer, width=8, layers=3, heads=2)
    return LanguageModel(flows.language_model(CLASSES, LENGTH, transformer), SETTINGS, **options)


def stateful():
    lstm = partial(LSTM, width=8, hidden=12)
    flow = flows.language_model(CLASSES, LENGTH, lstm)
    return LanguageModel(flow, SETTINGS, restart=0.2)


def several_passes():
    transformer = partial(Transformer, width=8, layers=2, heads=2, positions="lanes")
    flow = flows.language_model(CLASSES, LENGTH, transformer, ordering=Strided(4))
    return FlowModule(flow, SampledPasses([2, 4, 8]), SETTINGS)


def shared():
    backbone = partial(LevelConvolution, width=8, layers=2)
    flow = flows.stack(CLASSES, LENGTH, [Strided(4), Strided(4)], backbone, share_backbone=True)
    return FlowModule(flow, Local(), SETTINGS)


def latent():
    inference, emission = (LSTM(width=8, bidirectional=True) for _ in range(2))
    prior = AutoregressivePrior(features=4, hidden=8)
    return LatentFlowModule(
        LatentFlow(CLASSES, LENGTH, prior, inference, emission), optimization=SETTINGS
    )


convolution = partial(DilatedConvolution, width=8, layers=2)
KINDS = {
    "end to end": lambda: few_pass(convolution, EndToEnd()),
    "layerwise": lambda: few_pass(partial(LevelConvolution, width=8, layers=2), Layerwise()),
    "one transform a process": lambda: few_pass(convolution, Local(subsample="transforms")),
    "refitted base": lambda: few_pass(convolution, base_refit_every=2),
    "base alone": lambda: FlowModule(DiscreteFlow(FactorizedBase(CLASSES, LENGTH)), None, SETTINGS),
    "masked layers": lambda: few_pass(partial(MADE, width=8, length=LENGTH, hidden=16)),
    "lanes": lanes,
    "language model": language_model,
    "auxiliary losses": lambda: language_model(auxiliary=Auxiliary()),
    "language model of a state": stateful,
    "several passes": several_passes,
    "shared backbone": shared,
    "latent": latent,
}
DRAWS = {
    "one transform a process",
    "refitted base",
    "end to end",
    "lanes",
    "several passes",
    "latent",
}
"""Kinds whose training draws what differs from process to process."""


class Seen(Callback):
    """The optimizer's state at the end, and the bytes that this process holds."""

    def on_exception(self, trainer, pl_module, exception):
        traceback.print_exception(exception)  # the process may not come to tell

    def __init__(self, path=None, batches=0):
        self.path, self.batches = path, batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.path is not None and batch_idx == self.batches:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.optimizer = trainer.strategy.optimizer_state(optimizer)
        states = [value for state in optimizer.state.values() for value in state.values()]
        self.bytes = {
            "parameters": held(pl_module.parameters()),
            "optimizer": held(value for value in states if value.ndim),
        }


def held(tensors):
    """The bytes of tensors that lie in this process."""
    here = (value.to_local() if isinstance(value, DTensor) else value for value in tensors)
    return sum(value.numel() * value.element_size() for value in here)


class Rows(IterableDataset):
    """The rows of a text in batches, of which each process has its own part.

    Those of training go on where a checkpoint was written.
    """

    def __init__(self, trainer, rows):
        self.trainer, self.rows = trainer, rows

    def __iter__(self):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        for batch in self.rows.split(BATCH)[done if self.trainer.training else 0 :]:
            if part := list(batch.chunk(world)[rank : rank + 1]):
                yield part[0]


def fitted(kind, strategy, *, save=None, after=5, resume=None, **options):
    """Trains a module of a kind, and returns what a checkpoint of it has and what was found.

    It saves a checkpoint after so many batches, or resumes from one.
    """
    torch.manual_seed(1)
    module = KINDS[kind]()
    if isinstance(module, FlowModule):
        module.initialised.fill_(True)  # a process alone counts other rows than one of several
    keys = {
        "accelerator": "cpu",
        "strategy": strategy,
        "max_steps": 4,
        "max_epochs": -1,
        "val_check_interval": 2,
        "gradient_clip_val": 0.1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    if options.get("precision") == "16-mixed":  # by name, Lightning allows it on a GPU alone
        del options["precision"]
        options["plugins"] = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    seen = Seen(save, after)
    trainer = Trainer(**keys | options, callbacks=[seen])
    loaders = [
        DataLoader(Rows(trainer, text(number, seed)), batch_size=None)
        for number, seed in ((96, 1), (14, 2))
    ]
    trainer.fit(module, *loaders, ckpt_path=resume)
    found = {"state": module.state_dict(), "optimizer": seen.optimizer, "bytes": seen.bytes}
    logged = trainer.logged_metrics
    # The smoothed loss is that of a process.
    found["logged"] = {name: float(logged[name]) for name in logged if name != "train_bpc"}
    tested = trainer.test(module, loaders[1], verbose=False)
    found["tested"] = tested[0]
    found["sample"] = module.sample(2, generator=torch.Generator().manual_seed(1))
    return found
