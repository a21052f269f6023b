# shellcheck shell=bash disable=SC2034
# Clip-Cov (Cui et al., sections 4.2 and 4.3). Its numbers are in the recipe's controls.clip_cov. The authors' scripts give
# the ratio of probabilities [0, 2], so that the control and not the clip holds the entropy.
METHOD_ARGS=("control=[clip_cov]" loss.clip_low=1.0 loss.clip_high=1.0)
