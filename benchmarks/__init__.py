"""Benchmarks of stackbert_kernels against its peers: every op checked against float64, then timed in turn with the others.

python -m benchmarks [OP ...]        the op benchmarks, as `stackbert bench`
python -m benchmarks compare A B     what became slower between two result files
python -m benchmarks report          RESULTS.md from the committed results
python -m benchmarks.gpu --out DIR   everything that a machine with a GPU proves, in under nine minutes
"""
