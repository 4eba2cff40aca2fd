"""How many contacts and constraint rows a MuJoCo model can have at once."""

from __future__ import annotations

from typing import Any

# Contacts of a pair of geometry types, the lower type of MuJoCo's enumeration first.
_CONTACTS = {
    ("PLANE", "SPHERE"): 1,
    ("PLANE", "CAPSULE"): 2,
    ("PLANE", "ELLIPSOID"): 1,
    ("PLANE", "CYLINDER"): 4,
    ("PLANE", "BOX"): 8,
    ("SPHERE", "SPHERE"): 1,
    ("SPHERE", "CAPSULE"): 1,
    ("SPHERE", "CYLINDER"): 1,
    ("SPHERE", "BOX"): 1,
    ("CAPSULE", "CAPSULE"): 2,
    ("CAPSULE", "BOX"): 2,
    ("BOX", "BOX"): 8,
}
_MOST_CONTACTS = 50  # MuJoCo's own limit for a pair, for all others
_EQUALITY_ROWS = 7  # the most of one equality constraint: a weld has 6


def contacts_and_rows(model: Any) -> tuple[int, int]:
    """Upper bounds ``(contacts, constraint rows)`` of one env, from what can touch what.

    Args:
        model: a ``mujoco.MjModel``.
    """
    import mujoco

    of_types = {
        tuple(int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}")) for name in names): count
        for names, count in _CONTACTS.items()
    }
    contacts = 0
    if not model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_CONTACT:
        pairs = {
            (i, j) for j in range(model.ngeom) for i in range(j) if _may_touch(model, i, j)
        } | {tuple(sorted(p)) for p in zip(model.pair_geom1, model.pair_geom2, strict=True)}
        for pair in pairs:
            types = tuple(sorted(int(model.geom_type[geom]) for geom in pair))
            contacts += of_types.get(types, _MOST_CONTACTS)

    condim = max([1, *model.geom_condim, *model.pair_dim])
    pyramid = model.opt.cone == mujoco.mjtCone.mjCONE_PYRAMIDAL
    per_contact = max(1, 2 * (condim - 1)) if pyramid else condim
    rows = (
        contacts * per_contact
        + int(model.jnt_limited.sum())
        + int(model.tendon_limited.sum())
        + int((model.dof_frictionloss > 0).sum())
        + int((model.tendon_frictionloss > 0).sum())
        + _EQUALITY_ROWS * model.neq
    )
    return int(contacts), int(rows)


def _may_touch(model: Any, i: int, j: int) -> bool:
    bodies = model.geom_bodyid[i], model.geom_bodyid[j]
    kinds, with_kinds = model.geom_contype, model.geom_conaffinity
    filtered = not (kinds[i] & with_kinds[j] or kinds[j] & with_kinds[i])
    return bodies[0] != bodies[1] and not filtered
