#!/bin/bash
# This node's supervisor in a job of several nodes: SLURM and Kubernetes start one on each.
# HOSTS: DeepSpeed's hostfile. MEET: a folder that all nodes see. NODE: this one's name in HOSTS.
# All arguments go to pretrain.py.
set -eu
: "${HOSTS:?}" "${MEET:?}" "${NODE:=${SLURMD_NODENAME:?}}"
exec "${PYTHON:-.venv/bin/python}" pipelines/supervise.py \
    --hostfile "$HOSTS" --meet "$MEET" --node "$NODE" --min_nodes "${MIN_NODES:-0}" -- \
    "${LAUNCHER:-.venv/bin/deepspeed}" pipelines/pretrain.py "$@"
