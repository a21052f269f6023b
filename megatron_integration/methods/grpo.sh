# shellcheck shell=bash disable=SC2034
# GRPO with the usual clip: the baseline of Cui et al., section 4.3.
METHOD_ARGS=("control=[]" loss.clip_low=0.2 loss.clip_high=0.2)
