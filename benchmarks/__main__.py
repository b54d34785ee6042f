"""`python -m benchmarks {kernels,moe,step,memory,gpu,axes,streams_memory,parallel} [options]`."""

import sys

from benchmarks import axes, gpu, kernels, memory, parallel, step, streams_memory

TABLES = {
    "step": step.main,
    "kernels": kernels.main,
    "moe": kernels.moe,
    "memory": memory.main,
    "gpu": gpu.main,
    "axes": axes.main,
    "streams_memory": streams_memory.main,
    "parallel": parallel.main,
}

if __name__ == "__main__":
    usage = f"usage: python -m benchmarks {{{','.join(TABLES)}}} [options]"
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(usage)
        sys.exit()
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        sys.exit(usage)
    TABLES[sys.argv[1]](sys.argv[2:])
