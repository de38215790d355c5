"""Maps the top-level folders `kernels/`, `export/` and `bench/` into the `agln_fast` package.

They are imported as `agln_fast.kernels`, `agln_fast.export` and `agln_fast.bench`: a top-level import named `kernels`
would collide with the distribution of that name. Everything else about the package stands in `pyproject.toml`.
"""

from setuptools import find_packages, setup

MAPPED = ("kernels", "export", "bench")

packages = find_packages(include=["agln_fast", "agln_fast.*"])
for folder in MAPPED:
    packages += [f"agln_fast.{name}" for name in [folder, *(f"{folder}.{sub}" for sub in find_packages(folder))]]

packages.append("agln_fast.checkpoints")  # data alone
setup(packages=packages, package_dir={f"agln_fast.{folder}": folder for folder in MAPPED})
