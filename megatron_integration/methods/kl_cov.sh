# shellcheck shell=bash disable=SC2034
# KL-Cov (Cui et al., sections 4.2 and 4.3). Its numbers are in the recipe's controls.kl_cov: the ratio at 32B is a tenth of
# that at 7B. It drops the clip, as the authors' code does: clip_low and clip_high have no effect.
METHOD_ARGS=("control=[kl_cov]" loss.clip_low=0.2 loss.clip_high=0.2)
