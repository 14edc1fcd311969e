"""Float64 throughout: model code that says "float32" is heard as "at least float32"."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

# What names a 32-bit dtype in a call, and the wider one it stands for while the mode is active.
_LIFTED = {
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
    "torch.FloatTensor": "torch.DoubleTensor",
}
_FLOAT_METHODS = {torch.Tensor.float: torch.Tensor.double, torch.Tensor.cfloat: torch.Tensor.cdouble}
# These take their dtype from a tensor that may have come from outside in float32 (a mask, an input).
_LIKE_ANOTHER = {torch.Tensor.to, torch.Tensor.type_as}


class LiftFloat32(TorchFunctionMode):
    """While active, every request for float32 gives float64 (and for complex64, complex128).

    Norms, softmax and rotary tables compute in float32 inside, whatever the model's dtype is. In a model converted
    by `model.double()` such a cast rounds to 1e-7, and a comparison cannot see below. Under this mode

    - `x.float()`, `x.to(torch.float32)`, `x.type(...)`, `softmax(x, dtype=torch.float32)` and factories with
      `dtype=torch.float32` give float64;
    - factories without a dtype give float64, as the default dtype is float64;
    - `x.to(other)` and `x.type_as(other)` give float64 when `other` is float32.

    Casts to bfloat16 and float16 stay: code that asks for less than float32 means to round. Float32 tensors that
    exist before are not changed: convert the model and its inputs first. Code that insists that a cast gave float32
    (`assert y.dtype == torch.float32`) fails under this mode.
    """

    def __enter__(self):
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception):
        torch.set_default_dtype(self._default)
        return super().__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = _FLOAT_METHODS.get(function, function)
        from_tensors = function in _LIKE_ANOTHER
        lifted = [_lift(arg, from_tensors and place > 0) for place, arg in enumerate(args)]
        return function(*lifted, **{name: _lift(value, from_tensors) for name, value in (kwargs or {}).items()})


def _lift(value: object, from_tensors: bool) -> object:
    if isinstance(value, torch.dtype | str):
        return _LIFTED.get(value, value)
    if value is torch.FloatTensor:
        return torch.DoubleTensor
    if from_tensors and isinstance(value, torch.Tensor) and value.dtype in _LIFTED:
        return value.to(_LIFTED[value.dtype])
    return value
