"""The processes that hold one model in parts (tensor parallelism), and run one program on it."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from apr.errors import InvalidInput, RanksDiffer

# What a rank tells the others that it is about.
_RUNS, _CHOSE, _COUNTS, _FAILED = range(4)


class RankGroup:
    """The ranks of one model, with a connection of their own, on the CPU, for all its sessions."""

    def __init__(self, members: list[int]) -> None:
        self.members = members
        self.sessions = self._count = 0
        self._lost = ""
        self._busy = threading.Lock()
        # Made by all of its members, and by no others. It is never ended and made again: its name
        # would be that of the former one, at whose places the new one would look.
        self._group: Any = dist.new_group(members, backend="gloo", use_local_synchronization=True)

    def exchange(self, told: Sequence[int], timeout: float) -> list[list[int]]:
        """What each rank tells, and before it how many exchanges it has made."""
        rows = [torch.zeros(1 + len(told), dtype=torch.int64, device="cpu") for _ in self.members]

        def begin() -> Any:
            self._count += 1
            mine = np.array([self._count, *told], np.uint64).view(np.int64)
            return dist.all_gather(rows, torch.from_numpy(mine), self._group, True)

        self._wait(begin, timeout)
        return [row.tolist() for row in rows]

    def from_first(self, values: Tensor, timeout: float) -> None:
        """Write the first rank's values over these."""
        self._wait(lambda: dist.broadcast(values, self.members[0], self._group, True), timeout)

    def _wait(self, begin: Callable[[], Any], timeout: float) -> None:
        if not self._busy.acquire(blocking=False):
            raise InvalidInput(
                "a model in parts is stepped in two Python threads at once, whose order the other "
                "ranks cannot know; step it in one"
            )
        try:
            if self._lost:
                raise RuntimeError(self._lost)
            begin().wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            if not self._lost:
                self._lost = str(error)
                dist.destroy_process_group(self._group)  # others are not to wait for this one
            raise RanksDiffer(
                f"rank {self.members.index(dist.get_rank())} of {len(self.members)}: another rank "
                f"is gone, or did not come to this step in {timeout:g} s ({self._lost[:120]}); its "
                "own output says why. Start all ranks again; where one has slow work between "
                "steps, open sessions with a larger rank_timeout"
            ) from error
        finally:
            self._busy.release()


class Ranks:
    """Sees to it that all processes of a model do the same, or learn that one does not.

    Each forward of a model in parts waits for the others in the middle of its layers: one that
    runs something else makes wrong numbers, or waits for ever. So before each forward the ranks
    compare a digest of what they are about to run, and after each choice of tokens what they have
    chosen. One process alone has nothing to compare.
    """

    def __init__(self, group: RankGroup | None = None, timeout: float = 60.0) -> None:
        is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if not is_number or not timeout > 0:
            raise InvalidInput(f"rank_timeout: got {timeout!r}; expected seconds above 0")
        self._group, self.timeout = group, timeout
        self.size, self.number = 1, 0
        if group is not None:
            self.size, self.number = len(group.members), group.members.index(dist.get_rank())
            group.sessions += 1
            self._session = group.sessions

    # ---- the same everywhere --------------------------------------------------------------------

    def first(self, values: Tensor) -> Tensor:
        """The values, in host memory, that the first rank has: those of all, as a rule."""
        if self._group is not None:
            values = values.contiguous()
            digest = zlib.crc32(values.view(torch.uint8).numpy().tobytes())
            rows = self._exchange(_CHOSE, digest)
            if any(row[3] != rows[0][3] for row in self._same_kind(rows)):
                self._group.from_first(values, self.timeout)
        return values

    def first_number(self, value: float) -> float:
        """The number that the first rank has."""
        if self.size == 1:
            return value
        return float(self.first(torch.tensor([value], dtype=torch.float64, device="cpu")))

    def least(self, value: int) -> int:
        """The least number that any rank has."""
        if self.size == 1:
            return value
        return min(row[3] for row in self._same_kind(self._exchange(_COUNTS, value)))

    @contextlib.contextmanager
    def together(self, digest: Callable[[], int]) -> Iterator[None]:
        """Enter a forward of which this is the digest, if all ranks are about to run it.

        Raises RanksDiffer, on all of them, where one is not, or is not there in time.
        """
        self.agree(digest)
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_of_others(error):
                raise
            raise RanksDiffer(
                f"rank {self.number} of {self.size}: another rank is gone, in the middle of a "
                f"forward ({str(error)[:120]}); its own output says why. Start all ranks again"
            ) from error

    def agree(self, digest: Callable[[], int]) -> None:
        """The same for a caller whose forward is elsewhere."""
        if self.size == 1:
            return
        rows = self._same_kind(self._exchange(_RUNS, digest()))
        if any(row != rows[0] for row in rows):
            self._differ(rows)

    def agree_on(self, *settings: object) -> None:
        """Raise RanksDiffer, on all ranks, where one has other settings."""
        self.agree(lambda: zlib.crc32(repr(settings).encode()))

    def _same_kind(self, rows: list[list[int]]) -> list[list[int]]:
        """The rows, where all ranks are about the same thing, in the same session, as often."""
        failed = [rank for rank, row in enumerate(rows) if row[2] == _FAILED]
        if failed:
            raise RanksDiffer(
                f"rank {self.number} of {self.size}: rank {failed[0]} raised in this step, which "
                "was taken back here; its own output says why"
            )
        if any(row[:3] != rows[0][:3] for row in rows):
            self._differ(rows)
        return rows

    def _differ(self, rows: list[list[int]]) -> NoReturn:
        other = next(rank for rank, row in enumerate(rows) if row != rows[self.number])
        raise RanksDiffer(
            f"rank {self.number} of {self.size}: rank {other} is about to do something else "
            f"({rows[other]}, here {rows[self.number]}: exchanges so far, session, kind, and a "
            "digest of settings, threads, tokens, positions and views), so this was taken back. "
            "Ranks make the same calls, with the same options, tokens and seeds, in one Python "
            "thread; take back what differs, or open other sessions"
        )

    @contextlib.contextmanager
    def taking_part(self) -> Iterator[None]:
        """Tell the others where this rank raises: they are about to run what it does not."""
        try:
            yield
        except RanksDiffer:
            raise
        except BaseException:
            if self.size > 1:
                # The error that is on its way says more.
                with contextlib.suppress(RanksDiffer, InvalidInput):
                    self._exchange(_FAILED, 0)
            raise

    def _exchange(self, kind: int, digest: int) -> list[list[int]]:
        """Of each rank: how many exchanges it has made, in which session, kind, digest."""
        assert self._group is not None
        return self._group.exchange([self._session, kind, digest], self.timeout)


def _is_of_others(error: RuntimeError) -> bool:
    """Whether it is what a forward raises when another rank is gone."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in words or "connection closed" in words


def _tensor_parallel(mesh: Any) -> list[int]:
    """The ranks of a mesh, or those of its dimension for tensor parallelism where it has others."""
    if mesh.ndim > 1 and "tp" in (mesh.mesh_dim_names or ()):
        mesh = mesh["tp"]
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def members_of(model: nn.Module) -> list[int] | None:
    """The ranks that share a model's weights out among them, found by the weights; None where one
    process has them all.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.tensor import DTensor, Replicate

        for weight in model.parameters():
            if not isinstance(weight, DTensor) or weight.device_mesh.size() == 1:
                continue
            if not all(isinstance(placement, Replicate) for placement in weight.placements):
                return _tensor_parallel(weight.device_mesh)
    return None


def group_of(model: nn.Module) -> RankGroup | None:
    """The ranks of a model, connected; None where one process has it all."""
    members = members_of(model)
    return None if members is None else RankGroup(members)


def local_part(weight: Tensor) -> Tensor:
    """What this rank has of a weight: all of it, unless torch shards it."""
    to_local = getattr(weight, "to_local", None)
    part: Tensor = weight if to_local is None else to_local()
    return part


def own_file(path: Path, model: nn.Module) -> Path:
    """The file of this rank, of those that each keep a part of what `path` names."""
    members = members_of(model)
    if members is None:
        return path
    number = members.index(dist.get_rank())
    return path.with_name(f"{path.stem}.rank{number}of{len(members)}{path.suffix}")
