"""What several processes do together: stop at the same step, and end when one of them fails.

A signal reaches one process or all, at any time, and an error one alone. A process that then
waited for the others, in a barrier or a checkpoint, would wait for ever. So a signal is only noted,
and all processes agree before every step whether one was; and a process that fails waits for
nobody, but says so where the others look.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from dflows.cli.slurm import RequeueRequest

__all__ = ["SignalConnector", "Together", "join", "stops_together"]

LOOK_SECONDS = 1.0
"""How often a process looks for the failure of another, or a signal to it."""

GRACE_SECONDS = 10.0
"""How long a process may take to end by itself when another has failed."""

FAILURE = 1
_LOST = re.compile(r"(?i)gloo|nccl|processgroup|by peer|broken pipe|DistStore|TCPStore|collective")


class SignalConnector(_SignalConnector):
    """Creates Lightning's handlers of signals; of several processes, they only note the signal.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        self.noted: int | None = None

    def register_signal_handlers(self) -> None:
        """Registers the handlers, of several processes that of an interruption too."""
        super().register_signal_handlers()
        if self.trainer.world_size > 1:
            self._register_signal(signal.SIGINT, self._note)

    def _sigterm_notifier_fn(self, signum: int, frame: FrameType | None) -> None:
        if self.trainer.world_size > 1:
            self._note(signum, frame)
        else:
            self.received_sigterm = True

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.note(signum)

    def note(self, signum: int) -> None:
        """Notes a signal, which all processes will stop for.

        Raises:
            KeyboardInterrupt: If there was one before, and this interrupts.
        """
        if self.noted is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt  # the user does not want to wait
        self.noted = signum


class _Launcher(_SubprocessScriptLauncher):
    """Creates the launcher of the processes of a node, which leaves it to them how they end.

    Lightning's own kills all as soon as one ends with an error, even amid a checkpoint.
    """

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
    ) -> Any:
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._until_joined, daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _until_joined(self) -> None:
        """Ends this process if one that it started ends before all are one group."""
        while not distributed.is_initialized():
            if any(child.poll() for child in self.procs):
                _leave(self)
            time.sleep(LOOK_SECONDS)


def _is_of_the_group(error: BaseException) -> bool:
    """Says whether an error is of the group of processes, where another is gone."""
    told = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    return told or isinstance(error, distributed.DistError)


def _kill_children(launcher: Any) -> None:
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)


def _leave(launcher: Any) -> NoReturn:
    """Ends at once, with all that were started: whatever this process waits for does not come."""
    _kill_children(launcher)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILURE)


class Together(Callback):
    """Creates what lets several processes stop together, and none wait for another that is gone.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._watch: threading.Thread | None = None
        self._since: float | None = None
        self._failed = False  # another process, as it said itself
        self.agreed = False

    @property
    def _signals(self) -> SignalConnector:
        found: SignalConnector = self._trainer._signal_connector  # type: ignore[assignment]
        return found

    @property
    def _alone(self) -> bool:
        return self._trainer.world_size == 1 or not distributed.is_initialized()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begins to look after the other processes."""
        if self._alone or self._watch is not None:
            return
        # Lightning asks rank 0 alone before every step.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self.agree  # type: ignore[method-assign]
        self._watch = threading.Thread(target=self._look_on, name="dflows-together", daemon=True)
        self._watch.start()

    def agree(self) -> None:
        """Asks all processes, at the same place, whether one of them got a signal.

        Raises:
            KeyboardInterrupt: If one was interrupted, in all processes.
            SIGTERMException: If one is to terminate, likewise.
            RequeueRequest: If the time of the job is up.
        """
        noted = torch.tensor([self._signals.noted or 0], device=self._trainer.strategy.root_device)
        distributed.all_reduce(noted, distributed.ReduceOp.MAX)
        if signum := int(noted):
            self.agreed = True
            if signum == signal.SIGUSR1:
                raise RequeueRequest
            raise KeyboardInterrupt if signum == signal.SIGINT else SIGTERMException

    def on_validation_batch_end(self, *_: Any) -> None:
        """Leaves a validation where there was a signal; the others are on their way, too."""
        self._agree_early()

    def on_test_batch_end(self, *_: Any) -> None:
        """Leaves a test likewise."""
        self._agree_early()

    def on_validation_epoch_end(self, *_: Any) -> None:
        """Asks before the metrics of all processes are put together."""
        self._agree_at_the_end()

    def on_test_epoch_end(self, *_: Any) -> None:
        """Asks likewise."""
        self._agree_at_the_end()

    def _agree_early(self) -> None:
        if self._signals.noted is not None and not self._alone:
            self.agree()

    def _agree_at_the_end(self) -> None:
        if not self._alone:
            self.agree()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Ends without the others, if they do not all end here."""
        if self._alone or self.agreed:
            return
        rank = trainer.global_rank
        lost = _is_of_the_group(exception)
        if not lost:
            with suppress(Exception):
                _store().set(f"failed/{rank}", "1")
        if lost or rank:
            # What failed first, or on all, is said once.
            first = range(trainer.world_size) if lost else range(1)
            told = _wait(lambda: self._failed or self._have_failed(first), 2 * LOOK_SECONDS)
            if lost and not told:
                print(f"error in process {rank}: another process is gone", file=sys.stderr)
            if lost or told:
                self._end()
        else:  # the store goes with this process
            _wait(self._all_know, GRACE_SECONDS)
        _kill_children(trainer.strategy.launcher)

    def _others(self, ranks: range) -> list[int]:
        return [number for number in ranks if number != self._trainer.global_rank]

    def _have_failed(self, ranks: range) -> bool:
        """Says whether another of these processes has said that it failed."""
        return any(_store().check([f"failed/{number}"]) for number in self._others(ranks))

    def _all_know(self) -> bool:
        """Says whether all others know that this process failed, or have failed, too."""
        others = self._others(range(self._trainer.world_size))
        words = ("knows", "failed")
        return all(any(_store().check([f"{word}/{n}"]) for word in words) for n in others)

    def _look_on(self) -> None:
        """Looks, until the processes are one again, for failures of others and signals to them."""
        while not self._alone:
            time.sleep(LOOK_SECONDS)
            gone = False
            try:
                if not self._failed:
                    self._exchange_words()
            except Exception:  # noqa: BLE001 - the process that keeps the store is gone
                gone = True
            if self._failed or gone or self._children_failed():
                self._end_soon()

    def _exchange_words(self) -> None:
        """Tells the others of a signal, and learns of theirs and of their failures."""
        store, signals = _store(), self._signals
        if signals.noted is None and store.check(["signal"]):
            signals.noted = int(store.get("signal"))
        elif signals.noted is not None and not store.check(["signal"]):
            store.set("signal", str(signals.noted))
        if self._have_failed(range(self._trainer.world_size)):
            store.set(f"knows/{self._trainer.global_rank}", "1")
            self._failed = True

    def _children_failed(self) -> bool:
        launcher = self._trainer.strategy.launcher
        children = getattr(launcher, "procs", [])
        return not self.agreed and any(child.poll() for child in children)

    def _end_soon(self) -> None:
        """Ends this process, if it does not end by itself."""
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since > GRACE_SECONDS and not self._alone:
            self._end()

    def _end(self) -> None:
        _leave(self._trainer.strategy.launcher)


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits until a condition holds, for so many seconds at the most, and says whether it does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(Exception):
            if condition():
                return True
        time.sleep(0.1)
    return False


def _store() -> Any:
    """Returns where processes leave word for each other."""
    return PrefixStore("dflows", _get_default_store())


def stops_together(trainer: pl.Trainer) -> bool:
    """Says whether all processes of a trainer stop at the same place, so that they can save it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    together = next((entry for entry in callbacks if isinstance(entry, Together)), None)
    return trainer.world_size == 1 or (together is not None and together.agreed)


def join(trainer: pl.Trainer, timeout: float) -> None:
    """Lets the processes of a trainer stop and fail together.

    Args:
        trainer: The trainer, before it launches any.
        timeout: Seconds that a process waits for the others in any one place.
    """
    trainer._signal_connector = SignalConnector(trainer)
    trainer.callbacks.insert(0, Together(trainer))  # type: ignore[attr-defined]
    strategy = trainer.strategy
    if hasattr(strategy, "_timeout"):
        strategy._timeout = timedelta(seconds=timeout)
    launcher = strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        strategy._launcher = _Launcher(
            launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        )
