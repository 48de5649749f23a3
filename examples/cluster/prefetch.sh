#!/bin/bash
# On a machine with a network: fill the shared caches, then see that jobs will find everything.
#   SHARED=/shared/me bash examples/cluster/prefetch.sh
set -euo pipefail
source examples/cluster/environment.sh

# weights, tokenizer and configuration of the backbone
HF_HUB_OFFLINE=0 hf download HuggingFaceTB/SmolLM2-360M --exclude "*.bin" --exclude "*.onnx"

# the data's files: the plan reads and checks every row, and tells how much memory a GPU of 80 GiB would need.
# It loads no weights, so it would not fetch them either.
HF_HUB_OFFLINE=0 python train.py task=reward data=hub data.hub=PKU-Alignment/PKU-SafeRLHF \
  backbone=hf backbone.model=HuggingFaceTB/SmolLM2-360M adapter=lora trainer=gpu tracking=none plan=on plan.gpu=80

# once more without the network, as the jobs will
python train.py task=reward data=hub data.hub=PKU-Alignment/PKU-SafeRLHF \
  backbone=hf backbone.model=HuggingFaceTB/SmolLM2-360M adapter=lora trainer=gpu tracking=none plan=on plan.gpu=80
