#!/bin/bash
# Starts the supervisor of this node. In a job with several nodes, SLURM or Kubernetes runs it on each.
# HOSTS: DeepSpeed's hostfile. RENDEZVOUS: the rendezvous folder, shared by all nodes. NODE: the name of this
# node in HOSTS. All arguments are passed to pretrain.py.
set -eu
: "${HOSTS:?set it to the DeepSpeed hostfile}" "${RENDEZVOUS:?set it to a folder that all nodes share}"
: "${NODE:=${SLURMD_NODENAME:?set NODE to the name of this node in HOSTS}}"
exec "${PYTHON:-.venv/bin/python}" pipelines/supervise.py \
    --hostfile "$HOSTS" --rendezvous "$RENDEZVOUS" --node "$NODE" --min_nodes "${MIN_NODES:-0}" -- \
    "${LAUNCHER:-.venv/bin/deepspeed}" pipelines/pretrain.py "$@"
