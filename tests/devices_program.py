"""What tests/test_devices.py runs: models whose layers lie on two devices, beside the whole of them
on one. The devices are those of pretend_device.cpp.
"""

from __future__ import annotations

import sys
import tempfile
import types
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel, TopKLogitsWarper, masking_utils

import apr
from apr import hf
from apr.ops import device as gpu
from kernel_cases import emulate
from models import build
from ranks_program import SAMPLED, SMALL, TOKENIZER, crowded, logits, texts
from test_latent import _build as latents

FIRST, SECOND = "pretend:0", "pretend:1"


def pretend(library):
    """Have the two devices, served by whatever kernels serve the host's memory."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("pretend")
    module = types.ModuleType("torch.pretend")
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device = lambda: 2, lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    torch._register_device_module("pretend", module)
    served = gpu.backend
    gpu.backend = lambda device: served(torch.device("cpu") if device.type == "pretend" else device)


def spread(model):
    """The model with its later layers, and its head, on the second device."""
    base, layers = next(x for x in model.named_children() if isinstance(x[1], PreTrainedModel))
    where = {}
    for name, child in layers.named_children():
        place = SECOND if where and "embed" not in name and "rot" not in name else FIRST
        if isinstance(child, torch.nn.ModuleList):
            for i in range(len(child)):
                where[f"{base}.{name}.{i}"] = [FIRST, SECOND][2 * i >= len(child)]
        else:
            where[f"{base}.{name}"] = place
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, _ in model.named_children():
        if name != base:
            where[name] = FIRST if tied else SECOND
    return dispatch_model(model, where, main_device=FIRST, force_hooks=True)


def written(session, folder):
    """Logits of all kinds of steps, texts, and what goes on from a saved thread."""
    found, said = logits(session), texts(session)
    for keys in (True, False):
        kid = session.thread([5, 6, 7]).fork()[0]
        session.save(folder / "kid.safetensors", {"kid": kid}, keys=keys)
        again, named = apr.Session.open(folder / "kid.safetensors", session.model)
        with again:
            said.append(apr.decode(again, [named["kid"]], max_new_tokens=5, **SAMPLED)[0].tokens)
    return found, said


def lines(session, folder):
    """The same for models that keep more than keys, or rows of a cache: forks, trims, texts."""
    root = session.thread(list(range(3, 40)))
    found = [session.step([root])]
    kids = root.fork(3)
    for i, kid in enumerate(kids):
        kid.extend([20 + i] * (i + 1))
    found.append(session.step(kids))
    kids[0].trim(30)
    found.append(session.step(kids[:1]))
    apr.decode(session, kids, max_new_tokens=8)
    session.check()
    return torch.cat(found), [kid.tokens for kid in kids]


def equal(make):
    """A model on the CPU, all on the second device, and on both: logits within sums in another
    order, equal texts.
    """
    whole, there, parts = make(), make().to(SECOND), spread(make())
    with (
        tempfile.TemporaryDirectory() as folder,
        apr.Session(whole, 4096, 16) as one,
        apr.Session(there, 4096, 16) as other,
        apr.Session(parts, 4096, 16) as two,
    ):
        reads = one.spec.can_rotate and one.spec.vocab_size >= len(TOKENIZER)
        run = written if reads and not one.spec.no_keys else lines
        wanted, said = run(one, Path(folder))
        for session in (other, two):
            # Of one device, as a user has it who made it torch's default.
            default = nullcontext() if session is two else torch.device(SECOND)
            with default:
                found, also = run(session, Path(folder))
            apart = float((found.cpu() - wanted).abs().max() / wanted.std())
            assert apart < 1e-5, apart
            assert also == said, (also, said)
        assert two.spec.spread and not other.spec.spread
        places = [str(pool.k.device) for pool in two.pools]
        assert places == sorted(places) and (len(places) < 2 or len(set(places)) == 2), places


def some_vectors(session):
    layers, heads, dim = len(session.spec.layers), 2, session.spec.layers[0].head_dim
    generator = torch.Generator().manual_seed(2)
    made = (torch.randn(layers, heads, dim, generator=generator) for _ in range(2))
    return apr.PathVectors(*made)


def turned(model):
    """A thread whose vectors are added to keys that are turned."""
    with apr.Session(model, 4096, 16) as session:
        thread = session.thread([4, 5, 6])
        thread.vectors = some_vectors(session)
        return session.step([thread]).cpu()


def refused(call):
    try:
        call()
    except (RuntimeError, apr.InvalidInput) as error:
        return str(error)
    raise AssertionError("not refused")


def life():
    first, second = (torch.ones(2, device=place) for place in (FIRST, SECOND))
    assert "device" in refused(lambda: first + second)  # or nothing here would be shown
    whole, parts = (build("llama", vocab_size=len(TOKENIZER)) for _ in range(2))
    parts = spread(parts)
    wanted = crowded(whole, max_tokens=4096)
    assert crowded(parts, **SMALL) == wanted
    assert crowded(parts, max_tokens=4096, kv_dtype=torch.int8) == crowded(
        whole, max_tokens=4096, kv_dtype=torch.int8
    )
    assert torch.allclose(turned(parts), turned(whole), atol=1e-5)
    with tempfile.TemporaryDirectory() as folder, apr.Session(parts) as session:
        first, second = session.pools[0].k.device, session.pools[-1].k.device
        assert (str(first), str(second)) == (FIRST, SECOND)
        assert session.spec.bytes_per_token == 2 * session.spec.bytes_on(first)
        session.save(Path(folder) / "x.safetensors", {"x": session.thread([5])})
        opened = lambda: apr.Session.open(Path(folder) / "x.safetensors", parts, mapped=True)  # noqa: E731
        assert "mapped" in refused(opened)
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        there, _ = hf.load(folder, device=SECOND)
        assert "got 'nowhere'" in refused(lambda: hf.load(folder, device="nowhere"))
    with apr.Session(there, 4096) as session:
        assert {str(pool.k.device) for pool in session.pools} == {SECOND}
    assert crowded(there, max_tokens=4096) == wanted
    emulate(90)
    assert "several devices" in refused(lambda: apr.Session(parts, 4096, cuda_graphs=True))


def waits(name):
    """What the host waits for in the steps of a run: its tokens, and nothing else."""
    masking_utils.find_packed_sequence_indices = lambda _: None  # asks, in every forward
    model = build(name, vocab_size=len(TOKENIZER)).to(FIRST).bfloat16()
    noted = torch.ops.pretend.waits
    top_p = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    own = {"repetition_penalty": 1.3, "logits_processor": lambda _: [TopKLogitsWarper(5)]}
    for graphs in (None, True):
        with apr.Session(model, 4096, 16, cuda_graphs=graphs, self_test=False) as session:
            kids = session.thread(list(range(3, 40))).fork(4)
            for i, kid in enumerate(kids):
                kid.extend([5] * i)
            session.step(kids)
            for options in ({"do_sample": False}, top_p, own):
                if options is own and not session.spec.no_keys and graphs is None:
                    kids[0].vectors = some_vectors(session)
                run = apr.stream(session, kids, max_new_tokens=30, eos_token_id=[], **options)
                told = [noted() for _ in run]
                # Before, threads and tables are made: a page lasts 16 tokens.
                assert told[3:12] == [["a copy to the host"]] * 9, (options, told[3:6])
            for kid in kids:
                kid.extend([5])
            noted()
            session.step(kids)
            assert noted() == ["a number"]  # whether the logits are
            told = []
            beams = {"num_beams": 3, "max_new_tokens": 9, "eos_token_id": []}
            beams["on_step"] = lambda _, told=told: told.append(noted())
            apr.beam_search(session, TOKENIZER, [5, 6, 7], **beams)
            assert told[3:8] == [["a number", "a copy to the host"]] * 5, told[3:6]


def main():
    """The library, "cpu" or the emulated GPU whose kernels serve the devices, and models."""
    pretend(sys.argv[1])
    if sys.argv[2] != "cpu":
        emulate(int(sys.argv[2]))
    for name in sys.argv[3:]:
        if name == "life":
            life()
        elif name.startswith("waits:"):
            waits(name.removeprefix("waits:"))
        elif name == "deepseek":
            equal(partial(latents, "deepseek_v3"))
        else:
            equal(partial(build, name, vocab_size=len(TOKENIZER)))
        print(name, flush=True)


if __name__ == "__main__":
    main()
