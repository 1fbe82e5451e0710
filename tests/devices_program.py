"""What tests/test_devices.py runs: models whose layers lie on two devices, beside the whole of them
on one. The devices are those of pretend_device.cpp.
"""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path

import torch
from accelerate import dispatch_model

import apr
from apr import _core
from apr.ops import device as gpu
from kernel_cases import emulate
from models import FAMILIES, build
from ranks_program import PROMPT, SAMPLED, TOKENIZER, logits, texts

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
    base = model.get_submodule(model.base_model_prefix)
    where = {}
    for name, child in base.named_children():
        place = SECOND if where and "embed" not in name and "rot" not in name else FIRST
        if isinstance(child, torch.nn.ModuleList):
            for i in range(len(child)):
                where[f"{model.base_model_prefix}.{name}.{i}"] = [FIRST, SECOND][2 * i >= len(child)]
        else:
            where[f"{model.base_model_prefix}.{name}"] = place
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, _ in model.named_children():
        if name != model.base_model_prefix:
            where[name] = FIRST if tied else SECOND
    return dispatch_model(model, where, main_device=FIRST, force_hooks=True)


def written(session, folder):
    """Logits of all kinds of steps, texts, and what goes on from a saved thread."""
    found, said = logits(session), texts(session)
    session.save(folder / "kid.safetensors", {"kid": session.thread([5, 6, 7]).fork()[0]})
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


def equal(whole, parts, room, spread_out=True):
    with (
        tempfile.TemporaryDirectory() as folder,
        apr.Session(whole, 4096, 16) as one,
        apr.Session(parts, page_size=16, **room) as two,
    ):
        run = lines if one.spec.no_keys or not one.spec.can_rotate else written
        wanted, said = run(one, Path(folder))
        found, also = run(two, Path(folder))
        places = [str(pool.k.device) for pool in two.pools]
        assert places == [FIRST] * (len(places) // 2) + [SECOND] * (len(places) - len(places) // 2)
        apart = float((found.cpu() - wanted).abs().max() / wanted.std())
        assert apart < 1e-5, apart
        assert also == said, (also, said)
    return apart


def main():
    pretend(sys.argv[1])
    for name in sys.argv[2:]:
        family, _, kernels = name.partition(":")
        _core.force_instruction_set("")
        if kernels:
            emulate(int(kernels))
        whole, parts = (build(family, vocab_size=len(TOKENIZER)) for _ in range(2))
        parts = spread(parts)
        print(name, f"{equal(whole, parts, {'max_tokens': 4096}):.1e}", flush=True)


if __name__ == "__main__":
    main()
