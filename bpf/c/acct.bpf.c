// SPDX-License-Identifier: GPL-2.0-only
/* The two programs that count an interface's traffic and keep it to its limits.
 *
 * One copy is loaded per interface and direction, with the interface's slot patched in. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

#include "acct.h"
#include "limit.h"

int egress(struct __sk_buff *skb)
{
	return pass(skb, constant_of_this_copy(), DIRECTION_EGRESS);
}

int ingress(struct __sk_buff *skb)
{
	return pass(skb, constant_of_this_copy(), DIRECTION_INGRESS);
}
