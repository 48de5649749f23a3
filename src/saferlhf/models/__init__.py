"""Backbones, adapters, heads, locators and exports."""

import logging

# bitsandbytes, which peft imports whether it is used or not, complains at import about an optional kernel from the hub
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
