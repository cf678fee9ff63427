"""The loop of training, whose state in a checkpoint is a number of whole batches."""

from typing import Any

from pytorch_lightning.loops.fit_loop import _FitLoop

__all__ = ["FitLoop"]


class FitLoop(_FitLoop):
    """Creates Lightning's loop of training, which goes on exactly where a checkpoint was written.

    Whenever that was, the checkpoint counts the batches that are done, and says whether the
    validation after the last of them is still to come. Then it comes first when the run goes on,
    also if no step is left. A batch that was begun is not counted: it is trained on again.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._validated = 0
        self._owed = False

    @property
    def whole(self) -> bool:
        """Whether a number of whole batches is done, and no epoch or validation in its last act."""
        batches = self._batches()
        if self.trainer.validating:
            # What its end brings about may have been brought about in part.
            return self._validated != batches["processed"]
        epochs = self.epoch_progress.state_dict()["current"]
        ended = epochs["processed"] == epochs["completed"]
        return batches["ready"] == batches["completed"] and ended

    def validated(self) -> None:
        """Notes that all batches of a validation are done."""
        self._validated = self._batches()["processed"]

    def _batches(self) -> dict[str, int]:
        """Returns how many batches of training were begun, and how many are done."""
        return dict(self.epoch_loop.batch_progress.state_dict()["total"])

    def _owes_validation(self) -> bool:
        """Says whether a validation is due after the batches that are done."""
        batches = self._batches()
        if self._validated == batches["processed"]:
            return False
        if self.trainer.validating:
            return True
        return batches["ready"] == batches["processed"] and self._validation_is_due()

    def _validation_is_due(self) -> bool:
        """Says whether Lightning validates after the batch that it counts as the last, if ever."""
        epochs = self.epoch_progress.state_dict()["current"]
        if epochs["processed"] >= epochs["started"] or self._data_fetcher is None:
            return False  # the epoch is over, and the next has no batch yet
        return self.epoch_loop._should_check_val_fx(self._data_fetcher)

    def state_dict(self, destination: Any = None, prefix: str = "") -> dict[str, Any]:
        """Returns the state after the batches that are done."""
        state: dict[str, Any] = super().state_dict(destination, prefix)
        batches = state[f"{prefix}epoch_loop.batch_progress"]
        begun = batches["total"]["ready"] > batches["total"]["processed"]
        batches["is_last_batch"] &= not begun
        for count in (batches["total"], batches["current"]):
            count.update(dict.fromkeys(count, count["processed"]))
        steps = state[f"{prefix}epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        counted = [
            *(steps[name] for name in ("step", "zero_grad")),
            state[f"{prefix}epoch_loop.scheduler_progress"],
            state[f"{prefix}epoch_loop.val_loop.batch_progress"],
        ]
        for progress in counted:
            for count in (progress["total"], progress["current"]):
                count.update(dict.fromkeys(count, count["completed"]))
        epochs = state[f"{prefix}epoch_progress"]
        if (
            batches["is_last_batch"]
            and epochs["current"]["processed"] >= epochs["current"]["started"]
        ):
            # Between two epochs: Lightning would take the one that is over for the next.
            for count in (epochs["total"], epochs["current"]):
                count.update(dict.fromkeys(count, count["processed"]))
            batches["current"] = dict.fromkeys(batches["current"], 0)
            batches["is_last_batch"] = False
        state[f"{prefix}epoch_loop.state_dict"]["_batches_that_stepped"] = self.trainer.global_step
        return state

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Returns what the state of the loop has beside its counts."""
        return {**super().on_save_checkpoint(), "owes_validation": self._owes_validation()}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Takes up what :meth:`on_save_checkpoint` returned."""
        super().on_load_checkpoint(state_dict)
        self._owed = state_dict.get("owes_validation", False)

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do."""
        return super().skip and not self._owed

    def on_run_start(self) -> None:
        """Begins, with the validation that is owed."""
        super().on_run_start()
        loop, trainer = self.epoch_loop, self.trainer
        if self._owed:
            self._owed = False
            trainer.validating = True
            loop.val_loop.restarting = False
            # What it logs is of the step before, whose end is not counted until it is over.
            counted = not loop._should_accumulate()
            loop._batches_that_stepped -= counted
            loop.val_loop.run()
            loop._batches_that_stepped += counted
            trainer.training = True
        if not loop.restarting:
            return
        if loop.batch_progress.is_last_batch:
            # The epoch is over: Lightning would go on in it.
            loop.val_loop._has_run = True
        elif self._validation_is_due() and not loop._should_accumulate():
            # Lightning leaves the validation out that was done, and counts the step again.
            loop._batches_that_stepped -= 1

    def on_advance_end(self) -> None:
        """Ends an epoch."""
        if self.epoch_loop.restarting:  # it was over
            self.epoch_loop.val_loop._has_run = False
        super().on_advance_end()
        self.epoch_loop.restarting = False
