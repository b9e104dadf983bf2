#!/usr/bin/env python3
"""What a GPU would refuse or wait for, without one: training, validation, maps, attention and an attack on it.

    python .ci/device.py        # 20 seconds; the exit status is not 0 if something is wrong

The second device is emulated: its tensors hold real values on the CPU, but must not meet tensors of the CPU.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import gradcam  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from model import LAST_MAP, make_model  # noqa: E402

TINY = "--dataset synthetic --val-size 100 --width 4 --batch-size 20 --epochs 1 --warmup-epochs 0".split()


class Elsewhere(torch.Tensor):
    """A tensor that claims to be on another device, "meta", around one with real values on the CPU."""

    @staticmethod
    def __new__(cls, real):
        layout = {"strides": real.stride(), "storage_offset": real.storage_offset(), "dtype": real.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, real.shape, device="meta", **layout)
        tensor.real_one = real
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside OtherDevice")


class OtherDevice(TorchDispatchMode):
    """As on a GPU: tensors of both devices must not meet; float64 is not there (Apple); values are waited for."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        owners = {id(value.real_one): value for value in flat if type(value) is Elsewhere}
        there, target = bool(owners), kwargs.get("device")
        written = [id(args[0])] if func.overloadpacket.__name__.endswith("_") else []  # a number may only be read
        here = [v for v in flat if type(v) is not Elsewhere and (v.ndim > 0 or id(v) in written)]
        moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        assert moves or not (here and there), f"{func}: tensors of two devices"
        goes = there
        if target is not None:
            goes, kwargs["device"] = torch.device(target).type == "meta", torch.device("cpu")
        self.waits += there and (func is torch.ops.aten._local_scalar_dense.default or not goes)
        args, kwargs = tree_map_only(Elsewhere, lambda value: value.real_one, (args, kwargs))
        result = func(*args, **kwargs)

        def wrapped(value):
            assert value.dtype is not torch.float64, f"{func}: float64"
            return owners[id(value)] if id(value) in owners else Elsewhere(value)

        return tree_map_only(torch.Tensor, wrapped, result) if goes else result


def train_and_explain(flags, run_dir):
    """How often a run with these flags waits for the device; then a map, an attack and occlusion there."""
    gpu, saved, args = torch.device("meta"), {}, train.parse_args([*TINY, *flags.split()])
    with (
        patch.object(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()),
        patch.object(train, "save_checkpoint", lambda path, content: saved.update(content)),
        contextlib.redirect_stdout(io.StringIO()),
        OtherDevice() as mode,
    ):
        train.fit(args, gpu, (None, "emulated"), run_dir, {"history": []})
        waits = mode.waits
        model = make_model(args.model, width=4).to(gpu, memory_format=utils.memory_format(gpu))
        pixels, classes = torch.zeros(2, 32, 32, 3, dtype=torch.uint8).to(gpu), torch.tensor([1, 2])
        images = data.normalize(pixels)
        maps = gradcam.grad_cam(model, images, classes, LAST_MAP[args.model])
        attacked = data.attack(model, pixels, classes.to(gpu), 1, 2)
        gradcam.occlusion_drops(model, images, classes)
        for found in (maps, attacked, saved["model"]["fc.weight"], saved["optimizer"]["state"][0]):
            found = next(iter(found.values())) if isinstance(found, dict) else found
            assert type(found) is Elsewhere, flags
    return waits


def main():
    with tempfile.TemporaryDirectory() as folder:
        runs = "--limit 100", "--limit 200", "--limit 100 --mixup 0.2 --cutmix 1 --model cct"
        waits = [train_and_explain(flags, Path(folder)) for flags in runs]
    assert waits[0] == waits[1] == waits[2] <= 4, waits  # however many steps: numbers are read once an epoch
    mps = utils.memory_format(torch.device("mps"))  # where batch norm's gradient is wrong in channels_last
    with patch.object(data, "memory_format", lambda device: mps):
        assert data.normalize(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).is_contiguous()
    print(f"another device: nothing meets a tensor of the CPU; {waits[0]} waits an epoch")


if __name__ == "__main__":
    main()
