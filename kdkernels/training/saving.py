"""When a training is saved, and how it goes on from what was saved."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import broadcast_object_list

from . import checkpoints, runs
from .state import Training


class Saving:
    """Everything that ``fit`` does with its folder, if it has one. Only the main process writes.

    An epoch is saved in this order: the student, the checkpoint, the metrics. A run that is killed in between goes on
    from the checkpoint before and writes the same files again.
    """

    def __init__(self, folder: Path | None, overwrite: bool, resume: bool, every: int) -> None:
        if resume and (folder is None or overwrite):
            raise ValueError("resume needs output, the folder of the run, and no overwrite")
        if folder is not None and not resume:
            runs.check_free(folder, overwrite)
        self.folder, self.overwrite, self.resume, self.every = folder, overwrite, resume, every

    def begin(self, training: Training) -> None:
        """Take the folder, or be where the run in it was; where that is impossible it fails before the training."""
        if self.folder is None:
            return
        accelerator = training.accelerator
        chosen: list[str | None] = [None]
        if accelerator.is_main_process:
            runs.claim(self.folder, self.overwrite, self.resume)
            newest = checkpoints.newest(self.folder) if self.resume else None
            chosen = [newest.name if newest else None]
        if not self.resume:
            return
        if accelerator.num_processes > 1:
            broadcast_object_list(chosen)
        if chosen[0] is None:
            return
        training.load_state_dict(checkpoints.read(self.folder / chosen[0]))
        if accelerator.is_main_process:
            runs.save_metrics(self.folder, training.history)

    def epoch(self, training: Training) -> None:
        """Save the epoch that has ended, if it is its turn, and its student if it is the best."""
        row = training.history[-1]
        best = row.get("test_accuracy", -1.0) > training.best
        training.best = max(training.best, row.get("test_accuracy", -1.0))
        if self.folder is None:
            return
        turn = row["epoch"] % self.every == 0 or row["epoch"] == training.epochs or training.stop
        state = training.state_dict() if turn else None  # every process has its part in it
        if not training.accelerator.is_main_process:
            return
        names = [name for name, wanted in (("last", turn), ("best", best)) if wanted]
        with training.averaged():
            runs.save_student(self.folder, training.distillation.student, names)
        if state is not None:
            checkpoints.write(self.folder, int(row["epoch"]), state)
            runs.save_metrics(self.folder, training.history)
