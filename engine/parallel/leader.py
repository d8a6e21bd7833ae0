"""Rank 0: the runner that the core sees. It sends every plan to the others before it runs its own share of it.

The death of a follower ends the engine: whoever sees it breaks off the sum that this rank may be waiting in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.core import StepRunner
from engine.face import Done, LoadProgress
from engine.parallel.communicator import GroupCommunicator, connect, device_of_rank
from engine.parallel.followers import Followers
from engine.parallel.share import share_of
from engine.parallel.wire import Allowed, Point, Step
from engine.runner import Launched, Runner
from engine.runner import load_runner as load_one
from engine.sizing import check_config
from engine.step import Masks, StepPlan, StepResult


def load_runner(config: EngineConfig, progress: LoadProgress) -> StepRunner:
    """A runner that is loaded and warm, on one device or several.

    Raises:
        CheckpointError: the model file is missing, broken or of a kind that we do not run.
        EngineConfigError: these settings cannot work with this model on this machine.
        EngineDeadError: a rank ended or failed while loading.
    """
    if config.tensor_parallel_size == 1:
        return load_one(config, progress)
    return Leader.start(config, progress)


@dataclass(frozen=True, slots=True)
class JointStep:
    """A step that all ranks have begun."""

    launched: Launched
    followers: Followers

    def result(self) -> StepResult:
        with self.followers.blaming():
            result = self.launched.result()
        self.followers.check()  # what a broken sum made is no result
        return result


class Leader:
    """See `engine.core.StepRunner`. Use `start`."""

    adapters = None

    def __init__(self, runner: Runner, followers: Followers, communicator: GroupCommunicator) -> None:
        self._runner, self._followers, self._communicator = runner, followers, communicator
        self.info, self.eos_token_ids = runner.info, runner.eos_token_ids

    @classmethod
    def start(cls, config: EngineConfig, progress: LoadProgress) -> Leader:
        """Start all ranks and load the model. Raises what `load_runner` raises."""
        size = config.tensor_parallel_size
        check_config(config)
        device = device_of_rank(config.device, 0, size)
        with open_checkpoint(config.model_path) as checkpoint:  # what is wrong is said once, and before there are ranks
            share_of(checkpoint.config, size)
        progress("start ranks", Done(0.0))
        followers = Followers(config)

        def reading(phase: str, done: Done) -> None:
            followers.check()
            progress(phase, done)

        try:
            with followers.blaming():
                followers.meet(Point.STARTED)
                communicator = connect(followers.store, 0, size, device)
                followers.on_loss = communicator.abort
                runner = load_one(config, reading, communicator, lambda: followers.meet(Point.LOADED))
        except Exception:
            followers.close()
            raise
        return cls(runner, followers, communicator)

    def launch(self, plan: StepPlan, masks: Masks | None = None) -> JointStep:
        """Begin one step on all ranks; raises EngineDeadError if one of them is gone, as its result does."""
        self._followers.send(Step(plan, masks is not None))

        def shared() -> Mapping[int, bytes]:
            assert masks is not None
            made = dict(masks())
            self._followers.send(Allowed(made))
            return made

        with self._followers.blaming():
            return JointStep(self._runner.launch(plan, masks and shared), self._followers)

    def close(self) -> None:
        try:
            self._communicator.close()
        finally:  # a device that has failed says so again here
            self._followers.close()
