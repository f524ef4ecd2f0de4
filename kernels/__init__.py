"""The compiled code of linrnn, installed as `linrnn.kernels`."""
