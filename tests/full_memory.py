"""What torch raises where a GPU's memory runs out."""

import torch

WITHIN_CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


def by_allocator() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def by_cuda() -> RuntimeError:
    """As where a graph is made."""
    return torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later.")


def by_cublas() -> RuntimeError:
    return RuntimeError(WITHIN_CUBLAS)


def by_recording() -> RuntimeError:
    """The end of a recording in which memory ran out."""
    error = torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = by_cublas()
    return error


ERRORS = (by_allocator, by_cuda, by_cublas, by_recording)
