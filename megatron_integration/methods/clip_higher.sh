# shellcheck shell=bash disable=SC2034
# GRPO with DAPO's asymmetric clip, the second baseline of Cui et al., section 4.3: 0.28 above, 0.2 below.
METHOD_ARGS=("control=[]" loss.clip_low=0.2 loss.clip_high=0.28)
