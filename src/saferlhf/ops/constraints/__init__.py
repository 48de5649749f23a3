"""The kinds of constraint; `saferlhf.ops.constraint` is the door."""
