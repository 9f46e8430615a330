"""Tests of the vLLM plugin; they run where vLLM is installed: `make test-vllm`."""
