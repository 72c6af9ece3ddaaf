"""The files that only an exported directory runs: configuration, model and processor for ``trust_remote_code``.

They import our modules by their usual names; :mod:`mmoe.convert.ship` rewrites those imports on the way out.
"""
