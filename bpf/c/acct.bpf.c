// SPDX-License-Identifier: GPL-2.0-only
/* The two programs that count an interface's traffic. They never change a packet's fate.
 *
 * One copy is loaded per interface and direction, with the interface's slot patched in. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

#include "acct.h"

int egress(struct __sk_buff *skb)
{
	account(skb, slot_of_this_copy(), DIRECTION_EGRESS);
	return TC_ACT_UNSPEC;
}

int ingress(struct __sk_buff *skb)
{
	account(skb, slot_of_this_copy(), DIRECTION_INGRESS);
	return TC_ACT_UNSPEC;
}
