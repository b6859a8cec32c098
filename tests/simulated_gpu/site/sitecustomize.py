"""Put this folder and `tests` on PYTHONPATH and every Python process has the simulated GPU: a training worker, too."""

from simulated_gpu import gpu

gpu.insert()
