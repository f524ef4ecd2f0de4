"""The compiled code of linrnn, installed as `linrnn.kernels`.

`cpu` holds C++ behind a C ABI, built with the package when there is a compiler. It knows nothing of torch's or
Python's ABI: one build serves every version of both. Everything here takes and returns plain tensors, without
autograd; `linrnn.ops` puts the derivatives on top.
"""
