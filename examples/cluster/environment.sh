# Sourced by the job scripts of this folder, from the repository's folder: what all jobs share.
#   SHARED    a folder that every machine sees
#   TRACKING  the MLflow server, e.g. http://tracking-server:5000; empty: a file of its own for each job

: "${SHARED:?set SHARED to a folder that all machines see}"

source .venv/bin/activate

# models and data sets of the Hugging Face hub
export HF_HOME="$SHARED/huggingface"
# hidden states, converted models, hashes, a remote judge's answers
export SAFERLHF_CACHE="$SHARED/saferlhf"
# machines without a network find in a moment what they would wait for in vain; see prefetch.sh
export HF_HUB_OFFLINE=1

# sqlite is not made for writers on several machines: one file for each job (of an array: for each of its tasks)
TRACKING="${TRACKING:-sqlite:///$SHARED/mlflow-${SLURM_JOB_ID:-0}.db}"
