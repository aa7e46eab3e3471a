"""Rules by which ``load`` places parameters on a mesh: from a leaf's path to its sharding.

Axes of a mesh may be Auto or Explicit: ``logits`` takes both.
"""

from collections.abc import Callable

from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Which axis of a leaf is cut. A matrix is [in, out], its bias [out], the embedding [V, E].
_OUTPUTS = ("qkv_proj.kernel", "gate_up_proj.kernel", "lm_head.kernel")
_INPUTS = ("o_proj.kernel", "down_proj.kernel")
_BIASES = ("qkv_proj.bias", "gate_up_proj.bias")


def tensor_parallel(mesh: Mesh, axis: str) -> Callable[[str], NamedSharding]:
    """Megatron's rule (arXiv 1909.08053): layers are cut by heads and by columns of the MLP.

    q, k, v, gate and up are cut by output, ``o_proj`` and ``down_proj`` by input, embedding table
    and output layer by vocabulary; the rest lies everywhere. q|k|v and gate|up are one matrix each,
    whose cuts need not meet heads: XLA moves what lies elsewhere.

    Loading raises ``ValueError`` where the size of ``axis`` does not divide one of these. Raises
    ``ValueError`` if the mesh has no such axis.
    """
    _check_axis(mesh, axis)

    def rule(path: str) -> NamedSharding:
        if path.endswith(_OUTPUTS):
            spec = PartitionSpec(None, axis)
        elif path.endswith((*_INPUTS, *_BIASES, "embed_tokens.embedding")):
            spec = PartitionSpec(axis)
        else:
            spec = PartitionSpec()
        return NamedSharding(mesh, spec)

    return rule


def fsdp(mesh: Mesh, axis: str) -> Callable[[str], NamedSharding]:
    """Each device of ``axis`` holds a part of every matrix, cut by its inputs (ZeRO-3, FSDP).

    Shard the batch over the same axis: XLA then gathers a layer's matrices where it uses them, and
    scatters their gradients. Norms and biases, which are small, lie everywhere.

    Loading raises ``ValueError`` where the size of ``axis`` does not divide a matrix's inputs.
    Raises ``ValueError`` if the mesh has no such axis.
    """
    _check_axis(mesh, axis)

    def rule(path: str) -> NamedSharding:
        if path == "embed_tokens.embedding":
            spec = PartitionSpec(None, axis)
        elif path.endswith(".kernel"):
            spec = PartitionSpec(axis)
        else:
            spec = PartitionSpec()
        return NamedSharding(mesh, spec)

    return rule


def _check_axis(mesh: Mesh, axis: str) -> None:
    if axis not in mesh.axis_names:
        raise ValueError(f"{axis=} must be one of the mesh's axes, {mesh.axis_names}")
