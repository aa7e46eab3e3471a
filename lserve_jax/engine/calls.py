"""Calls of jitted functions, told apart as their programs are: by shapes, dtypes and places."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from lserve_jax.engine.state import Program


@dataclass(frozen=True)
class Call:
    """A jitted function with its arguments, of which those by name and ``Program``s are static.

    To prepare its program, arrays may be described: a ``jax.ShapeDtypeStruct`` each.
    """

    function: Any
    args: tuple[Any, ...]
    static: dict[str, Hashable]

    @classmethod
    def of(cls, function: Any, *args: Any, **static: Hashable) -> "Call":
        """``function(*args, **static)``, not called yet."""
        return cls(function, args, static)

    @property
    def name(self) -> str:
        """The function's."""
        return self.function.__name__

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What the compiled program takes."""
        return tuple(arg for arg in self.args if not isinstance(arg, Program))

    def described(self) -> "Call":
        """The same of shapes alone: it holds no array, which another call may be given to keep."""
        args = (arg if isinstance(arg, Program) else jax.tree.map(_shape, arg) for arg in self.args)
        return Call(self.function, tuple(args), self.static)

    def plain(self) -> Any:
        """What the function returns where JAX's own caches are used."""
        return self.function(*self.args, **self.static)

    def signature(self, *, sharded: bool) -> Hashable:
        """Tells the programs of one runner apart; if ``sharded``, where arrays lie counts too."""
        leaves, tree = jax.tree.flatten(self.arrays)
        kinds = tuple([(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves])
        places = tuple(places_of(leaves)) if sharded else ()
        return self.function, tuple(self.static.items()), tree, kinds, places

    def description(self) -> str:
        """All that the program depends on but for the sources and the machine."""
        leaves, tree = jax.tree.flatten(self.arrays)
        places = places_of(leaves)
        shardings = {id(sharding): sharding for sharding, _ in places}
        described = {key: _describe_sharding(sharding) for key, sharding in shardings.items()}
        lines = [self.function.__module__, self.name, repr(sorted(self.static.items())), str(tree)]
        lines += [repr(arg) for arg in self.args if isinstance(arg, Program)]
        lines += [
            f"{leaf.shape} {leaf.dtype} {leaf.weak_type} {committed} {described[id(sharding)]}"
            for leaf, (sharding, committed) in zip(leaves, places, strict=True)
        ]
        return "\n".join(lines)

    def mesh_devices(self) -> list[jax.Device]:
        """Those of arrays that lie on several devices, in their order; empty where none does.

        Raises ``ValueError`` for arrays on several devices without a mesh, or on different meshes.
        """
        orders = set()
        for sharding, _ in places_of(jax.tree.leaves(self.arrays)):
            if len(sharding.device_set) > 1:
                if not isinstance(sharding, NamedSharding):
                    raise ValueError(f"its arrays lie on several devices by {sharding}")
                orders.add(tuple(sharding.mesh.devices.flat))
        if len(orders) > 1:
            raise ValueError("its arrays lie on different meshes")
        return list(orders.pop()) if orders else []


def places_of(leaves: Sequence[Any]) -> list[tuple[jax.sharding.Sharding, bool]]:
    """Where arrays lie, and whether they are bound there (committed).

    One that is only described is bound where that says so; else it will come to lie where whatever
    nobody places does.
    """
    places, anywhere = [], None
    for leaf in leaves:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            places.append((leaf.sharding, leaf.committed))
        elif leaf.sharding is None:
            anywhere = anywhere or jax.device_put(np.int32(0)).sharding
            places.append((anywhere, False))
        else:
            places.append((leaf.sharding, True))
    return places


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    [(sharding, committed)] = places_of([leaf])
    place = sharding if committed else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place, weak_type=leaf.weak_type)


def _describe_sharding(sharding: jax.sharding.Sharding) -> str:
    if not isinstance(sharding, NamedSharding):
        return repr(sharding)
    order = [device.id for device in sharding.mesh.devices.flat]
    return f"{sharding!r} {sharding.mesh!r} {order}"
