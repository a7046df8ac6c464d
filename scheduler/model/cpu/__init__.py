"""The fast way to run a model on CPUs: kernels in C++, and a decoder made of them."""
