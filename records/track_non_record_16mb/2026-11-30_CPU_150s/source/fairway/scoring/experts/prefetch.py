"""One Numba intrinsic: ask for a cache line before it is needed."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of array[index], for one dimension; the index is not checked.

    It changes speed and nothing else. The tables do not fit into the processor's caches, so without
    it nearly every lookup would wait for memory.
    """

    def generate(context, builder, signature, arguments):
        array_type = signature.args[0]
        view = context.make_array(array_type)(context, builder, arguments[0])
        item = cgutils.get_item_pointer(
            context, builder, array_type, view, [arguments[1]], wraparound=False
        )
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        )
        # The three words: for writing, keep it in every cache level, data (not instructions).
        builder.call(hint, [builder.bitcast(item, pointer), word(1), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
