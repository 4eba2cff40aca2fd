"""Runs every kernel once on fixed numbers and prints what it wrote, as JSON lists by name.

A program of its own, without torch and numpy, so that it starts quickly under an emulator too.
"""

from __future__ import annotations

import ctypes
import json
import math
from array import array

from pwm_fast import _C

ROWS, N, BINS, MEMBERS = 37, 77, 101, 2


def numbers(count: int, scale: float = 1.0, offset: float = 0.0, kind: str = "f") -> array:
    """The same everywhere, and irregular."""
    return array(kind, (offset + scale * math.sin(1.7 * i * i + 0.3 * i) for i in range(count)))


def nothing(count: int, kind: str = "f") -> array:
    """Zeros."""
    return array(kind, [0] * count)


class View(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = (
        *(("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device", ctypes.c_int32)),
        *(("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8)),
        *(("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p)),
        ("offset", ctypes.c_uint64),
    )


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(View))
def view_of(tensor: Tensor, out: ctypes._Pointer[View]) -> int:
    """The view of a :class:`Tensor`."""
    code, bits = {"f": (2, 32), "d": (2, 64), "H": (4, 16), "q": (0, 64)}[tensor.values.typecode]
    sizes = [array.buffer_info(x)[0] for x in (tensor.values, tensor.shape, tensor.strides)]
    data, shape, strides = sizes
    out[0] = View(data, 1, 0, len(tensor.shape), code, bits, 1, shape, strides, 0)
    return 0


# DLPackExchangeAPI: version 1.3, no older one, and its functions, of which only one is called.
EXCHANGE = (ctypes.c_void_p * 7)(
    1 | 3 << 32, None, None, None, None, ctypes.cast(view_of, ctypes.c_void_p).value, None
)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = (
    ctypes.py_object,
    (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
)


class Tensor:
    """Numbers of an array as a tensor whose last dimension is ``n``; bf16 is 16-bit words."""

    __dlpack_c_exchange_api__ = _capsule(ctypes.addressof(EXCHANGE), b"dlpack_exchange_api", None)

    def __init__(self, values: array, n: int = 0) -> None:
        self.values = values
        self.shape = array("q", [len(values) // n, n] if n else [len(values)])
        self.strides = array("q", [n, 1] if n else [1])


def matrix(values: array) -> Tensor:
    """Rows of N."""
    return Tensor(values, N)


def at(values: array) -> int:
    """Address."""
    return values.buffer_info()[0]


def main() -> None:
    """Run and print."""
    out: dict[str, array] = {"isa": array("b", _C.cpu_isa().encode())}
    size = ROWS * N
    x, dy = numbers(size, 3.0), numbers(size, 1.0, 0.1)
    bias, gamma, beta = numbers(N), numbers(N, 0.3, 1.0), numbers(N, 0.5)
    for code, act, group in ((0, "none", 1), (1, "mish", 1), (2, "simnorm", 7), (2, "simnorm", 11)):
        name = f"norm_act {code} {group}"
        y, xhat, rstd, dx = nothing(size), nothing(size), nothing(ROWS), nothing(size)
        sums = [nothing(N, "d") for _ in range(3)]
        affine = {"gamma": Tensor(gamma), "beta": Tensor(beta), "act": act, "group": group}
        saved = {"y": matrix(y), "xhat": matrix(xhat), "rstd": Tensor(rstd)}
        added = {"bias": Tensor(bias), "add": Tensor(bias), "w_tau": Tensor(beta)}
        _C.norm_act_fwd(
            x=matrix(x), tau=Tensor(x[:ROWS]), eps=1e-5, threads=1, **saved, **added, **affine
        )
        dgamma, dbeta, dbias = map(Tensor, sums)
        _C.norm_act_bwd(
            **{"dy": matrix(dy), "dx": matrix(dx), "dgamma": dgamma, "dbeta": dbeta},
            **{"dbias": dbias, "threads": 1},
            **saved,
            **affine,
        )
        out |= {f"{name} y": y, f"{name} xhat": xhat, f"{name} rstd": rstd, f"{name} dx": dx}
        out |= {f"{name} sums {i}": values for i, values in enumerate(sums)}

    half, wide = nothing(size, "H"), nothing(size)
    _C.norm_act_fwd(x=matrix(x), y=matrix(half), act="mish", group=1, eps=1e-5, threads=1)
    _C.act_norm_fwd(x=matrix(half), y=matrix(wide), act="none", eps=1e-5, threads=1)
    out["bf16"] = wide

    members = {"act": "mish", "rows_per_member": -(-ROWS // MEMBERS), "threads": 1}
    bias, gamma, beta = (numbers(MEMBERS * N, 0.4, offset) for offset in (0.0, 1.0, 0.2))
    y, u, dx = nothing(size), nothing(size), nothing(size)
    mean, rstd = nothing(ROWS), nothing(ROWS)
    sums = [nothing(MEMBERS * N, "d") for _ in range(3)]
    saved = {"u": matrix(u), "mean": Tensor(mean), "rstd": Tensor(rstd), "gamma": matrix(gamma)}
    _C.act_norm_fwd(
        **{"x": matrix(x), "y": matrix(y), "bias": matrix(bias), "beta": matrix(beta)},
        eps=1e-5,
        **saved,
        **members,
    )
    dgamma, dbeta, dbias = map(matrix, sums)
    _C.act_norm_bwd(
        **{"dy": matrix(dy), "dx": matrix(dx), "dgamma": dgamma, "dbeta": dbeta, "dbias": dbias},
        **saved,
        **members,
    )
    out |= {"act_norm y": y, "act_norm u": u, "act_norm mean": mean, "act_norm dx": dx}
    out |= {f"act_norm sums {i}": values for i, values in enumerate(sums)}

    count = ROWS * 64
    for group in (4, 8, 16, 32):
        y, dx = nothing(count), nothing(count)
        rows = Tensor(y, 64)
        _C.simnorm_fwd(x=Tensor(x[:count], 64), y=rows, group=group, threads=1)
        _C.simnorm_bwd(dy=Tensor(dy[:count], 64), y=rows, dx=Tensor(dx, 64), group=group, threads=1)
        out |= {f"simnorm {group} y": y, f"simnorm {group} dx": dx}

    logits, targets = numbers(ROWS * BINS, 5.0), numbers(ROWS, 9.0)
    value, mean, lse, loss = (nothing(ROWS) for _ in range(4))
    d_decode, d_ce = nothing(ROWS * BINS), nothing(ROWS * BINS)
    options = {"logits": Tensor(logits, BINS), "vmin": -10.0, "vmax": 10.0, "transform": True}
    options |= {"threads": 1, "lse": Tensor(lse)}
    x_, m_ = Tensor(targets), Tensor(mean)
    _C.two_hot_decode_fwd(value=Tensor(value), mean=m_, **options)
    _C.two_hot_decode_bwd(dvalue=x_, mean=m_, dlogits=Tensor(d_decode, BINS), **options)
    _C.two_hot_ce_fwd(x=x_, loss=Tensor(loss), **options)
    _C.two_hot_ce_bwd(dloss=x_, x=x_, dlogits=Tensor(d_ce, BINS), **options)
    out |= {"value": value, "mean": mean, "lse": lse, "loss": loss}
    out |= {"d_decode": d_decode, "d_ce": d_ce}

    y = nothing(size)
    _C.axpby(z=Tensor(x), k1=Tensor(dy), k2=Tensor(x), out=Tensor(y), c1=0.25, c2=0.7, threads=1)
    out["axpby"] = y

    lists = {name: numbers(size, 0.5, 0.1) for name in ("params", "grads", "means")}
    lists["squares"] = numbers(size, 0.5, 1.0)
    steps, norm, skips = array("f", [3.0]), nothing(1), nothing(2, "q")
    _C.adam(
        options=Tensor(array("d", [0.7, 0.95, 1e-8, 1.0])),
        **{name: [Tensor(values)] for name, values in lists.items()},
        **{"steps": [Tensor(steps)], "rates": [Tensor(array("d", [0.01]))]},
        **{"loss": Tensor(array("f", [1.0])), "norm": Tensor(norm), "keep": True, "threads": 1},
        **{"skipped": Tensor(skips[:1]), "in_a_row": Tensor(skips[1:])},
    )
    out |= {f"adam {name}": values for name, values in lists.items()} | {"adam norm": norm}

    total = _C.checksum([at(x), 1, 4 * size, 0, at(dy), 3, 4 * 17, 4 * 23], 1)
    out["checksum"] = array("d", [total >> 32, total & 0xFFFFFFFF])

    for samples in (3, 16, 21):
        grads = [numbers(5000, 1.0, 0.2 + 0.01 * i) for i in range(samples)]
        addresses, sizes = Tensor(array("q", map(at, grads)), 1), Tensor(array("q", [5000]))
        signal, noise = nothing(1, "d"), nothing(1, "d")
        results = {"signal": Tensor(signal), "noise": Tensor(noise)}
        _C.esnr(grads=addresses, sizes=sizes, **results, threads=1)
        out |= {f"signal of {samples}": signal, f"noise of {samples}": noise}

    print(json.dumps({name: values.tolist() for name, values in out.items()}))


if __name__ == "__main__":
    main()
