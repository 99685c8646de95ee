"""Megatron-Core has to be prepared for a machine without CUDA before any test imports it, whatever their order."""

from alflb_megatron.hosts import cpu

cpu.prepare()
