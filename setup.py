"""Builds the compiled kernel; all else is in pyproject.toml."""

import sysconfig

from setuptools import Extension, setup

# One wheel serves every Python from 3.11 on; those without a global lock have no stable interface.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "boft_export.native._fold",
            ["boft_export/native/_fold.c"],
            depends=["boft_export/native/kernel.h"],
            extra_compile_args=["-O3", "-g0", "-ffp-contract=off", "-Wno-psabi"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE else [],
            py_limited_api=STABLE,
            # Where there is no compiler, installing goes on without: torch serves.
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
