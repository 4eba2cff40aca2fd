"""Runs every kernel once on fixed numbers and prints what it wrote, as JSON lists by name.

A program of its own, without torch and numpy, so that it starts quickly under an emulator too.
"""

from __future__ import annotations

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


def at(values: array) -> int:
    """Address."""
    return values.buffer_info()[0]


def main() -> None:
    """Run and print."""
    out: dict[str, array] = {"isa": array("b", _C.cpu_isa().encode())}
    size = ROWS * N
    x, dy = numbers(size, 3.0), numbers(size, 1.0, 0.1)
    bias, gamma, beta = numbers(N), numbers(N, 0.3, 1.0), numbers(N, 0.5)
    for act, group in ((0, 1), (1, 1), (2, 7), (2, 11)):
        name = f"norm_act {act} {group}"
        y, xhat, rstd, dx = nothing(size), nothing(size), nothing(ROWS), nothing(size)
        sums = [nothing(N, "d") for _ in range(3)]
        _C.norm_act_fwd(
            *(at(x), N, 0, at(bias), N, 1, at(x), 1, at(beta), at(bias), at(gamma), at(beta)),
            *(at(y), N, 0, at(xhat), 0, at(rstd), ROWS, N, act, group, 1e-5, 1),
        )
        _C.norm_act_bwd(
            *(at(dy), N, 0, at(xhat), 0, at(rstd), at(gamma), at(beta), at(y), N, 0),
            *(at(dx), N, 0, *map(at, sums), ROWS, N, act, group, 1),
        )
        out |= {f"{name} y": y, f"{name} xhat": xhat, f"{name} rstd": rstd, f"{name} dx": dx}
        out |= {f"{name} sums {i}": values for i, values in enumerate(sums)}

    half = nothing(size, "H")
    _C.norm_act_fwd(
        *(at(x), N, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, at(half), N, 1, 0, 0, 0),
        *(ROWS, N, 1, 1, 1e-5, 1),
    )
    wide = nothing(size)
    _C.act_norm_fwd(*(at(half), N, 1, 0, 0, 0, at(wide), N, 0, 0, 0, 0, 0, ROWS, N, 0, 0, 1e-5, 1))
    out["bf16"] = wide

    each = -(-ROWS // MEMBERS)
    bias, gamma, beta = (numbers(MEMBERS * N, 0.4, offset) for offset in (0.0, 1.0, 0.2))
    y, u, dx = nothing(size), nothing(size), nothing(size)
    mean, rstd = nothing(ROWS), nothing(ROWS)
    sums = [nothing(MEMBERS * N, "d") for _ in range(3)]
    _C.act_norm_fwd(
        *(at(x), N, 0, at(bias), at(gamma), at(beta), at(y), N, 0, at(u), 0, at(mean), at(rstd)),
        *(ROWS, N, 1, each, 1e-5, 1),
    )
    _C.act_norm_bwd(
        *(at(dy), N, 0, at(u), 0, at(mean), at(rstd), at(gamma), at(dx), N, 0, *map(at, sums)),
        *(ROWS, N, 1, each, 1),
    )
    out |= {"act_norm y": y, "act_norm u": u, "act_norm mean": mean, "act_norm dx": dx}
    out |= {f"act_norm sums {i}": values for i, values in enumerate(sums)}

    count = ROWS * 64
    for group in (4, 8, 16, 32):
        y, dx = nothing(count), nothing(count)
        _C.simnorm_fwd(at(x), 64, at(y), 64, ROWS, 64, group, 1)
        _C.simnorm_bwd(at(dy), 64, at(y), 64, at(dx), 64, ROWS, 64, group, 1)
        out |= {f"simnorm {group} y": y, f"simnorm {group} dx": dx}

    logits, targets = numbers(ROWS * BINS, 5.0), numbers(ROWS, 9.0)
    value, mean, lse, loss = (nothing(ROWS) for _ in range(4))
    d_decode, d_ce = nothing(ROWS * BINS), nothing(ROWS * BINS)
    rest = (ROWS, BINS, -10.0, 10.0, True, 1)
    rows = (at(logits), BINS, 0)
    _C.two_hot_decode_fwd(*rows, at(value), at(mean), at(lse), *rest)
    _C.two_hot_decode_bwd(at(targets), *rows, at(mean), at(lse), at(d_decode), BINS, *rest)
    _C.two_hot_ce_fwd(*rows, at(targets), at(loss), at(lse), *rest)
    _C.two_hot_ce_bwd(at(targets), *rows, at(targets), at(lse), at(d_ce), BINS, *rest)
    out |= {"value": value, "mean": mean, "lse": lse, "loss": loss}
    out |= {"d_decode": d_decode, "d_ce": d_ce}

    y = nothing(size)
    _C.axpby(at(x), at(dy), at(x), at(y), 0.25, 0.7, size, 1)
    out["axpby"] = y

    total = _C.checksum([at(x), 1, 4 * size, 0, at(dy), 3, 4 * 17, 4 * 23], 1)
    out["checksum"] = array("d", [total >> 32, total & 0xFFFFFFFF])

    for samples in (3, 16, 21):
        grads = [numbers(5000, 1.0, 0.2 + 0.01 * i) for i in range(samples)]
        addresses, sizes = array("q", map(at, grads)), array("q", [5000])
        signal, noise = nothing(1, "d"), nothing(1, "d")
        _C.esnr(at(addresses), at(sizes), at(signal), at(noise), samples, 1, 1)
        out |= {f"signal of {samples}": signal, f"noise of {samples}": noise}

    print(json.dumps({name: values.tolist() for name, values in out.items()}))


if __name__ == "__main__":
    main()
