"""Tensors that say they are on CUDA and hold their numbers on the CPU.

Inside `Pretending`, mixing devices raises as CUDA would, and whatever makes the host wait for the device is
counted by the project's line that asked for it. Fused kernels, memory and collectives are not seen.
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from pretended_kernels import KERNELS, attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
PACKAGE = str(Path(__file__).parents[1] / "codyra_llm") + "/"

waits: Counter[tuple[str, str]] = Counter()  # (what was asked for, the project's line) -> how often
recording = None  # the graph that takes down what runs on the device, where one is recorded

# What CUDA allows between devices, besides scalars: copies, and what looks at no number.
ACROSS = {"copy_", "_to_copy", "set_", "lift_fresh", "lift", "detach", "clone", "alias"}
# Where a scalar tensor of the CPU is refused too.
NO_SCALARS = {
    "mm",
    "addmm",
    "bmm",
    "cat",
    "stack",
    "index_select",
    "gather",
    "scatter",
    "embedding",
    "_fused_adamw_",  # its step counts
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# The host needs numbers from the device to go on: the value, or the shape of the result.
READING = {
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "is_nonzero",
    "bincount",
    "_linalg_check_errors",
    "linalg_cholesky",
    "linalg_lstsq",
}


class DevicesMixed(RuntimeError):
    """What CUDA would refuse."""


def wait(kind: str) -> None:
    """Count a wait of the host at the innermost line of the project."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    line = "" if frame is None else f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
    waits[kind, line] += 1


class OnDevice(Tensor):
    """A tensor that says it is on CUDA; `held` has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self):
        return f"OnDevice({self.held!r})"

    def tolist(self):
        wait("tolist")
        return self.held.detach().tolist()

    def numpy(self, **options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                copy = OnDevice(self.held.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]


class Pretending(TorchDispatchMode):
    """While it is entered, every operator goes through `dispatch`, and factories make tensors on either
    device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args: tuple, kwargs: dict):
    """Do on the CPU what `func` asks for, after what CUDA would say of the devices."""
    name = _name(func)
    tensors = _tensors([*args, *kwargs.values()])
    here = any(isinstance(tensor, OnDevice) for tensor in tensors)
    target = _target(name, args, kwargs, here)
    if here:
        _check_devices(func, name, args, kwargs, tensors)
        _count_reading(func, name, kwargs)
    if name == "copy_":
        non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        _count_copy(args[1], isinstance(args[0], OnDevice), non_blocking)
    if name == "_to_copy":
        _count_copy(args[0], target, kwargs.get("non_blocking"))
    generator = kwargs.get("generator")
    if target and generator is not None and generator.device.type == "cpu":
        raise DevicesMixed(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    pinned = kwargs.get("pin_memory")
    written = _written(func, args, kwargs)
    if recording:
        for tensor in _tensors([written]):  # one, or those of a list
            if isinstance(tensor, OnDevice):
                recording.keep(tensor)
    out = computed(func, args, kwargs)
    if written is not None and func._schema.returns:
        result = written
    else:
        result = _mapped(_on_device, out) if target else out
    if recording and (here or target):
        recording.take(func, args, kwargs, result)
    if pinned:
        result.pinned = True
    return result


@cache
def _name(func) -> str:
    return func._schema.name.split("::")[-1]


@cache
def _kernel(func) -> Callable:
    """What computes an operator here."""
    return KERNELS.get(str(func), func)


def _tensors(values: list | tuple) -> list[Tensor]:
    """Those among an operator's arguments, some of which are lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _mapped(change: Callable, value):
    """`value`, or what a list or tuple holds, each through `change`; pytree's own does far more than that,
    which is slow at every operator."""
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, each) for each in value])
    return change(value)


def _target(name: str, args: tuple, kwargs: dict, here: bool) -> bool:
    """Whether the result is on the device."""
    asked = kwargs.get("device")
    if asked is not None:
        return torch.device(asked).type == "cuda"
    return isinstance(args[0], OnDevice) if name == "_to_copy" else here


def computed(func, args: tuple, kwargs: dict):
    """The result on the CPU."""
    args = _mapped(_held, args)
    kwargs = {key: _mapped(_held, value) for key, value in kwargs.items()}
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    return _kernel(func)(*args, **kwargs)


def _held(value):
    return value.held if isinstance(value, OnDevice) else value


def _on_device(value):
    return OnDevice(value) if type(value) is Tensor else value


def _written(func, args: tuple, kwargs: dict):
    """The argument that an operator in place, or with `out`, writes into and returns."""
    for position, name in _writing(func):
        if name in kwargs:
            return kwargs[name]
        if position < len(args):
            return args[position]
    return None


@cache
def _writing(func) -> list[tuple[int, str]]:
    """Position and name of the arguments that an operator writes into: slow to ask for at every call."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _check_devices(func, name: str, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
    """Raise where CUDA would: for a tensor elsewhere, unless it is a scalar and those are taken, and for
    a result of the device that would be written into the CPU's memory."""
    if name in INDEXING:
        _check_indices(func, name, args)
        return
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    if not others or name in ACROSS:
        return
    if name in NO_SCALARS or any(tensor.dim() > 0 for tensor in others):
        shapes = [(tuple(tensor.shape), tensor.device.type) for tensor in tensors]
        raise DevicesMixed(f"expected all tensors to be on the same device: {func} of {shapes}")
    written = _written(func, args, kwargs)
    if isinstance(written, Tensor) and not isinstance(written, OnDevice):
        raise DevicesMixed(f"{func}: a result of the device would be written into a tensor on the CPU")


def _check_indices(func, name: str, args: tuple) -> None:
    """Indices may lie on the CPU, which makes the host wait while they are copied; nothing else may."""
    indexed, indices = args[:2]
    if not isinstance(indexed, OnDevice):
        raise DevicesMixed(f"{func}: a tensor on the CPU is indexed by one on the device")
    if "index_put" in name and not isinstance(args[2], OnDevice) and args[2].dim() > 0:
        raise DevicesMixed(f"{func}: values on the CPU for a tensor on the device")
    for index in indices:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            wait("index by a mask")
        elif isinstance(index, Tensor) and not isinstance(index, OnDevice):
            wait("index on the CPU")


def _count_reading(func, name: str, kwargs: dict) -> None:
    if name in READING:
        wait(name)
    lengths = name == "repeat_interleave" and func._overloadname == "Tensor"
    if lengths and kwargs.get("output_size") is None:
        wait("repeat_interleave without output_size")


def _count_copy(source: Tensor, target: bool, non_blocking: bool | None) -> None:
    """Between devices the host waits, unless it copies from pinned memory and says that it won't."""
    if isinstance(source, OnDevice) and not target:
        wait("copy to the host")
    pinned = getattr(source, "pinned", False)
    if target and not isinstance(source, OnDevice) and not (pinned and non_blocking):
        wait("copy to the device")


def install() -> None:
    """Make this process believe in the device, for good. The library of `pretend/hooks.cpp` is preloaded."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.autograd.set_multithreading_enabled(False)  # backward runs in the thread that has the mode
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.nn.functional.scaled_dot_product_attention = attention
    stated = {
        "_lazy_init": None,
        "mem_get_info": (1 << 30, 1 << 34),
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "get_device_name": "a device that is not there",
    }
    for name, value in stated.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in ("synchronize", "empty_cache"):  # memory is given back when the device is done with it
        setattr(torch.cuda, name, lambda *_, name=name: wait(name))
