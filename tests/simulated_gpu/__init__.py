"""A simulated CUDA GPU for a CPU build of torch: the tests run on it what otherwise only a real GPU would run. See README.md."""
