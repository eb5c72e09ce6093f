"""How fast the kernels are, beside the device's own ceilings and beside other implementations.

``python -m benchmarks.kernels`` measures all operations; ``--help`` lists what can be chosen. Each
operation is a module: its ``cases`` function names what is measured, with the figure each case has
to reach, and its ``tune`` function, where it has one, finds the settings that are fastest on the
present device. The others are shared: ``bench``, ``ceilings``, ``peers``, ``read_kernel``,
``timing``.
"""
