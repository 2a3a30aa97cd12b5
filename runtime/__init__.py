"""Executing a plan on stock torch: DTensor, FSDP2, torch.distributed.pipelining, torchrun."""
