"""`kernels/` lies at the root of the repository and is imported as `sjd_engine.kernels`: a top-level package of that
name would collide with Hugging Face's."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sjd_engine*"]), "sjd_engine.kernels"],
    package_dir={"sjd_engine.kernels": "kernels"},
    package_data={"sjd_engine": ["assets/*/*", "py.typed"]},
)
