"""Threads in a file: what they are, their keys and values, and of which model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apr.errors import ForeignThread, InvalidInput, UnsupportedModel
from apr.hf.model_state import undisturbed, unwrap
from apr.hf.ranks import local_part, own_file
from apr.hf.spec import ModelSpec
from apr.hf.vectors import PathVectors
from apr.ops.codes import KV_DTYPES
from apr.ops.device import Copies
from apr.threads import files
from apr.threads.thread import Segment, Thread

if TYPE_CHECKING:
    from apr.threads.session import Session

_SAMPLES = 64  # elements of each weight that tell one model from another
# Of the spread of its logits: what other machines and batches make of the same model.
_SAME = {torch.bfloat16: 0.1, torch.float16: 0.05}

Named = Mapping[str, Thread | Segment]


def save(session: Session, path: str | Path, named: Named, keys: bool) -> None:
    """`Session.save`."""
    if keys and session.spec.states is not None:
        raise UnsupportedModel(
            "save: this model keeps a state of all that a thread has read, which no file holds; "
            "save its tokens, with keys=False"
        )
    core = session.table.edit()
    threads, segments = _sort(session, named)
    if not keys:
        _check_lines(session, threads, segments)
    if keys and session.memory.offload is not None:
        handles = [segment._id for segment in segments.values()]
        session.memory.offload.make_room(core, [t._id for t in threads.values()], handles)
    numbers, pages, filled = core.save(
        [thread._id for thread in threads.values()],
        [segment._id for segment in segments.values()],
        keys,
    )
    tensors = {"table": torch.from_numpy(numbers)}
    tensors["answers"] = _answers(session.spec, session.attachment.model)
    index = Copies(torch.tensor(pages, dtype=torch.long, device="cpu"))
    offsets = torch.arange(session.page_size, device="cpu")
    behind = offsets >= torch.tensor(filled, device="cpu").reshape(-1, 1)
    page, slot = behind.nonzero(as_tuple=True)
    for i, pool in enumerate(session.pools if keys else ()):
        for name, side in pool.sides.items():
            kept = side[index.on(side.device)].cpu()
            # What lies behind the last token is somebody else's, or nobody's.
            kept[page, :, slot] = 0
            tensors[f"{i}.{name}"] = kept
    # Also of writers that have gone; forks share them.
    distinct = list({id(v): v for v in session.table.vectors.values()}.values())
    for i, vectors in enumerate(distinct):
        for name, part in vectors._asdict().items():
            tensors[f"vectors.{i}.{name}"] = part.detach().to("cpu", torch.float32)
    places = {id(vectors): i for i, vectors in enumerate(distinct)}
    told = {
        "vectors": {number: places[id(v)] for number, v in session.table.vectors.items()},
        "page_size": session.page_size,
        "kv_dtype": next((n for n, x in KV_DTYPES.items() if x == session.spec.kv_dtype), None),
        "keys": keys,
        "pages": len(pages),
        "tokens_tell": session.table.tokens_tell,
        "seed": session.table.seed,
        "requests": session.table.requests,
        "model": _model_facts(session.spec, session.attachment.model),
        "threads": {
            name: {"number": t._id, "seed_path": t.seed_path, "label": t.label}
            for name, t in threads.items()
        },
        "segments": {name: segment._id for name, segment in segments.items()},
    }
    file = own_file(Path(path), session.attachment.model)
    files.write(file, json.dumps(told, sort_keys=True), tensors)


def _sort(session: Session, named: Named) -> tuple[dict[str, Thread], dict[str, Segment]]:
    """The threads and the segments; raises where they are not the session's."""
    threads: dict[str, Thread] = {}
    segments: dict[str, Segment] = {}
    if not isinstance(named, Mapping):
        raise InvalidInput(f"save: got {named!r:.80}; expected a dict of threads by names of yours")
    for name, one in named.items():
        if isinstance(one, Segment):
            session.table.number_of(one)
            segments[name] = one
        elif session.table.owns(one):
            threads[name] = one
        else:
            raise ForeignThread(
                f"save: got {one!r} as {name!r}; expected threads and segments of this session"
            )
    if not named:
        raise InvalidInput("save: got nothing; expected threads or segments by name")
    return threads, segments


def _check_lines(
    session: Session, threads: dict[str, Thread], segments: dict[str, Segment]
) -> None:
    """Raise InvalidInput for what its tokens alone do not tell."""
    if not session.table.tokens_tell:
        raise InvalidInput(
            "save: got keys=False in a session whose threads had vectors, images or embeddings, "
            "which their tokens do not tell; save them with their keys"
        )
    if segments:
        raise InvalidInput(
            f"save: got the segment {next(iter(segments))!r} with keys=False; what its tokens have "
            "read is not known any more: save it with its keys"
        )
    for name, thread in threads.items():
        if not thread.is_line:
            raise InvalidInput(
                f"save: got {name!r} with keys=False, a thread with a view of its own, with joined "
                "keys or with a part dropped, which its tokens do not tell; save it with its keys"
            )


def _model_facts(spec: ModelSpec, model: Any) -> dict[str, Any]:
    """What must be the same where the keys and values are used again."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        weight = local_part(tensor)
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta" and weight.numel():
            flat = weight.detach().reshape(-1)
            places = _samples_of(flat.numel())
            digest.update(flat[places.to(flat.device)].to("cpu", torch.float64).numpy().tobytes())
    shapes = [
        [x.kv_heads, x.head_dim, x.head_dim_v, x.window, x.chunk, x.latent is not None]
        for x in spec.layers
    ]
    return {
        "class": type(model).__name__,
        "dtype": str(spec.dtype),
        "vocabulary": spec.vocab_size,
        "layers": shapes,
        "weights": digest.hexdigest(),
    }


def _answers(spec: ModelSpec, model: Any) -> torch.Tensor:
    """Some of the model's own logits of a fixed text: they tell what no list of settings does."""
    ids = torch.tensor([[(7 * i + 3) % spec.vocab_size for i in range(16)]], device=spec.device)
    with torch.no_grad(), undisturbed(spec.device):
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
    some: torch.Tensor = logits[_samples_of(spec.vocab_size)]
    return some


def _samples_of(count: int) -> torch.Tensor:
    """Places of _SAMPLES of `count` numbers, from the first to the last."""
    ends = torch.linspace(0, count - 1, _SAMPLES, dtype=torch.float64, device="cpu")
    return ends.long()


def open_saved(
    kind: type[Session], path: str | Path, model: Any, mapped: bool, options: dict[str, Any]
) -> Any:
    """`Session.open`."""
    for name in ("page_size", "seed", "kv_dtype"):
        if name in options:
            raise InvalidInput(f"open: got {name}; it is the file's, leave it out")
    path = own_file(Path(path), unwrap(model))
    opened = files.read(path)
    told, tensors = opened.told, opened.tensors
    if mapped and not told["keys"]:
        raise InvalidInput(f"open: got mapped=True, and {path} holds no keys; leave it out")
    if mapped and options.get("start_tokens") is not None:
        raise InvalidInput("open: got start_tokens with mapped=True; a pool that grows is copied")
    kept = KV_DTYPES.get(told["kv_dtype"])
    if kept is None and told["kv_dtype"] is not None:
        raise InvalidInput(
            f"open: {path} has keys in {told['kv_dtype']}, which this version does not know; save "
            "it again with this one"
        )
    session = kind(model, page_size=told["page_size"], seed=told["seed"], kv_dtype=kept, **options)
    try:
        facts = _model_facts(session.spec, session.attachment.model)
        wrong = [name for name, value in told["model"].items() if facts.get(name) != value]
        if wrong:
            was, now = ({n: f.get(n) for n in wrong} for f in (told["model"], facts))
            raise InvalidInput(
                f"open: {path} was saved with another model: {str(was)[:200]}; got "
                f"{str(now)[:200]}; open it with the model, and the dtype, that it was saved with"
            )
        said = tensors["answers"]
        says = _answers(session.spec, session.attachment.model)
        apart = float((says - said).abs().max() / said.std().clamp_min(1e-6))
        if not apart <= _SAME.get(session.spec.dtype, 1e-3):
            raise InvalidInput(
                f"open: {path} was saved with a model of the same weights that answers otherwise, "
                f"by {apart:.2g} standard deviations of its logits: with other settings"
            )
        away = [str(device) for device in session.spec.devices if device.type != "cpu"]
        if mapped and away:
            raise InvalidInput(
                f"open: got mapped=True for a model on {', '.join(away)}, whose memory no file can "
                "be; leave it out"
            )
        return session, _place(session, opened, mapped)
    except BaseException:
        session.close()
        raise


def _run_again(session: Session, threads: list[Thread]) -> None:
    """Fill the pages of threads that are lines: what they have in common is run once, in a session
    that is closed behind it.
    """
    core, size = session.table.ask(), session.page_size
    stored = [(core.stored_slots(t._id).tolist(), t.tokens) for t in threads]
    # In this order each has the most in common with the one before.
    lines = sorted((slots, tokens[: len(slots)]) for slots, tokens in stored if slots)
    if not lines:
        return
    pages = len({slot // size for slots, _ in lines for slot in slots}) + 2 * len(lines)
    with type(session)(
        session.model, pages * size, size, session.step_tokens, session.invariant,
        self_test=False, rank_timeout=session.ranks.timeout, kv_dtype=session.spec.kv_dtype,
    ) as other:  # fmt: skip
        runs: list[Thread] = []
        before: list[int] = []
        for slots, tokens in lines:
            pairs = enumerate(zip(before, slots, strict=False))
            most = min(len(before), len(slots))
            same = next((i for i, (was, now) in pairs if was != now), most)
            run = runs[-1].fork(1)[0] if same else other.thread()
            run.trim(same)
            run.extend(tokens[same:])
            runs.append(run)
            before = slots
        other.step(runs)
        for (slots, _), run in zip(lines, runs, strict=True):
            _copy(session, slots, other, other.table.ask().stored_slots(run._id).tolist())


def _copy(session: Session, slots: list[int], other: Session, theirs: list[int]) -> None:
    """Take the keys and values of another session's slots into those of this one."""
    places = Copies([slots, theirs])
    size = session.page_size
    for pool, ran in zip(session.pools, other.pools, strict=True):
        for name, side in pool.sides.items():
            now, was = places.on(side.device)
            side[now // size, :, now % size] = ran.sides[name][was // size, :, was % size]


def _place(session: Session, opened: files.Opened, mapped: bool) -> dict[str, Thread | Segment]:
    table, core = session.table, session.table.edit()
    told, tensors = opened.told, opened.tensors
    session.memory.grow(core, told["pages"])
    pages = core.load(tensors["table"].tolist())
    pools = enumerate(session.pools if told["keys"] else ())
    sides = {f"{i}.{name}": side for i, pool in pools for name, side in pool.sides.items()}
    for name, side in sides.items():
        want, kept = (len(pages), *side.shape[1:]), tensors.get(name)
        if kept is None or (tuple(kept.shape), kept.dtype) != (want, side.dtype):
            raise InvalidInput(f"open: {opened.path} does not fit together; save it again")
    if mapped and pages == list(range(len(pages))):  # as they are given out at first
        session.memory.arena.wait()
        files.map_pages(opened, sides)
    else:
        index = Copies(torch.tensor(pages, dtype=torch.long, device="cpu"))
        for name, side in sides.items():
            side[index.on(side.device)] = tensors[name].to(side.device)
    distinct = [
        PathVectors(*(tensors[f"vectors.{i}.{name}"] for name in PathVectors._fields))
        for i in sorted(set(told["vectors"].values()))
    ]
    for number, i in told["vectors"].items():
        distinct[i].check(session.spec)
        table.set_vectors(int(number), distinct[i])
    table.requests, table.tokens_tell = told["requests"], told["tokens_tell"]
    named: dict[str, Thread | Segment] = {}
    threads: dict[int, Thread] = {}
    for name, one in told["threads"].items():
        number = one["number"]
        if number not in threads:  # it may have several names
            threads[number] = Thread(table, core.hold_thread(number), tuple(one["seed_path"]))
            threads[number].label = one["label"]
            table.trace.thread(number, len(threads[number]))
        named[name] = threads[number]
    for name, number in told["segments"].items():
        named[name] = table.segment_of(number)
    if session.pools and not told["keys"]:
        _run_again(session, list(threads.values()))
    session.check()
    return named
