from kernels import *  # noqa: F403 (lets editors follow the package_dir mapping)
