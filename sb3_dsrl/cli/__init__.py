"""The command line, ``sb3-dsrl``: each command is a module with ``Args``, its flags, and ``main``, which takes them."""
