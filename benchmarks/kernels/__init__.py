"""How fast the kernels are, beside the device's own ceilings and beside other implementations.

``python -m benchmarks.kernels`` measures all operations; ``--help`` lists what can be chosen. Each
module here but ``bench``, ``ceilings``, ``peers`` and ``timing`` is one operation: its ``cases``
function names what is measured, with the figure each case has to reach, and its ``tune`` function,
where it has one, finds the settings that are fastest on the present device.
"""
