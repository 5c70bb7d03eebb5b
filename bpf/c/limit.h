/* SPDX-License-Identifier: GPL-2.0-only */
/* What becomes of a packet that was counted: its class's place in a queue and mark on the wire, or its end.
 *
 * A packet is counted first, so what is dropped here is in the counters and in the drops: the pod did send it.
 * Without rules nothing is touched. Both maps have an entry per slot. */
#ifndef KND_LIMIT_H
#define KND_LIMIT_H

/* Of map `rules`, which the programs only read. */
struct rules {
	u32 flags;
	u32 class; /* of every packet, with RULES_ONE_CLASS */
	u32 queues[KND_DIRECTIONS]; /* handle of an HTB whose minor numbers are KND_LEAF + class; 0: none */
	u32 detour; /* ifindex of an ifb, whose queue what comes in waits in; 0: none */
	u32 credit; /* with RULES_DEPART: what may leave at once after a pause, in 2**12 ns */
	u8 mark[KND_CLASSES]; /* the DSCP that packets of each class leave with; above 63: what they have */
	u64 cost[KND_DIRECTIONS]; /* 2**-20 ns that a byte takes at the limit; 0: none */
	u64 burst[KND_DIRECTIONS]; /* how far ahead of time packets may come, in ns */
	u64 share[KND_DIRECTIONS][KND_CLASSES]; /* as cost, of what a class can always have; 0: nothing */
};

#define RULES_ANY 1 /* there are some: the others are looked at */
#define RULES_ONE_CLASS 2
#define RULES_MARK 4
#define RULES_DEPART 8 /* what leaves is told when, for a queue that waits until then */

/* Of map `police`. due: when all that was let through would have passed at the limit, as ktime. */
struct police {
	u64 due[KND_DIRECTIONS];
	u64 dropped_bytes[KND_DIRECTIONS];
	u64 dropped_packets[KND_DIRECTIONS];
	u64 share_due[KND_DIRECTIONS][KND_CLASSES];
};

_Static_assert(sizeof(struct rules) == KND_RULES_BYTES, "struct rules differs from bpf/layout.py");
_Static_assert(sizeof(struct police) == KND_POLICE_BYTES, "struct police differs from bpf/layout.py");
_Static_assert(RULES_MARK == KND_RULES_MARK && RULES_ONE_CLASS == KND_RULES_ONE_CLASS &&
	       RULES_DEPART == KND_RULES_DEPART,
	       "a flag differs from bpf/layout.py");

#define COST_SHIFT 20
#define TRIES 4
#define ANY_BURST (~0ULL)
#define TOO_LATE (~0ULL)
#define CREDIT_SHIFT 12
#define MARK_SHIFT 2 /* congestion is told from a quarter of a full queue on */
#define DSCP_MAX 63
#define IPV6_CLASS_AT_MOST 0x0fc0 /* the DSCP's bits in the first two bytes of an IPv6 header */

/* A virtual clock that is charged cost, unless that takes it further ahead of now than burst: by how much it was
 * ahead, or TOO_LATE. So what TCP's small queues fill again and again, a packet of many segments at a time, has room
 * left for a small packet of others. What is larger than half of burst has its turn while that is half empty.
 * Several CPUs charge one clock, so what is too late for one is tried again; whoever was overtaken each time is let
 * through and charged all the same. */
INLINE u64 charge(volatile u64 *due, u64 now, u64 cost, u64 burst)
{
	u64 ahead = 0;
	u32 i;

#pragma unroll
	for (i = 0; i < TRIES; i++) {
		u64 before = *due, from = before > now ? before : now;

		ahead = from - now;
		if (ahead + cost > burst && ahead > burst >> 1)
			return TOO_LATE;
		if (__sync_val_compare_and_swap(due, before, from + cost) == before)
			return ahead;
	}
	__sync_fetch_and_add(due, cost);
	return ahead;
}

/* What a class is guaranteed passes whatever the others send, and is charged to the whole like everything: so the
 * others have that much less, and the flood of one class costs no other its share. */
INLINE u64 charge_all(struct police *police, const struct rules *rules, enum direction direction, u64 now,
		      const struct counted *counted)
{
	u64 bytes = counted->bytes;
	u64 cost = (bytes * rules->cost[direction]) >> COST_SHIFT, burst = rules->burst[direction];
	u32 class = bounded(counted->class, 7);
	u64 share = rules->share[direction][class];

	if (share && charge(&police->share_due[direction][class], now, (bytes * share) >> COST_SHIFT, burst) !=
			     TOO_LATE)
		burst = ANY_BURST;
	return charge(&police->due[direction], now, cost, burst);
}

/* One queue of all classes: a packet leaves when what came before it has passed at the limit. A sender that asked
 * to be later (TCP's pacing, SO_TXTIME) has that, but no later than a full queue would have it: or what a pod saved up
 * by asking would leave at one moment. The queue's clock is the one of bpf_ktime_get_ns. */
INLINE void depart(struct __sk_buff *skb, const struct rules *rules, u64 now, u64 ahead)
{
	u64 credit = (u64)rules->credit << CREDIT_SHIFT, full = rules->burst[DIRECTION_EGRESS] - credit;
	u64 asked = skb->tstamp, first = now;

	if (ahead > credit)
		first += ahead - credit;
	if (first > now || asked > now) {
		if (asked > now + full)
			asked = now + full;
		skb->tstamp = asked > first ? asked : first;
	}
	if (first - now > full >> MARK_SHIFT)
		bpf_skb_ecn_set_ce(skb);
}

INLINE bool dropped(struct __sk_buff *skb, const struct rules *rules, u32 slot, enum direction direction,
		    const struct counted *counted)
{
	struct police *police;
	u64 now, ahead;

	if (!rules->cost[direction])
		return false;
	police = bpf_map_lookup_elem((void *)bpf_pseudo_fd(KND_PSEUDO_MAP_FD, KND_MAP_POLICE), &slot);
	if (!police)
		return false;
	now = bpf_ktime_get_ns();
	ahead = charge_all(police, rules, direction, now, counted);
	if (ahead == TOO_LATE) {
		__sync_fetch_and_add(&police->dropped_bytes[direction], counted->bytes);
		__sync_fetch_and_add(&police->dropped_packets[direction], counted->packets);
		return true;
	}
	if (direction == DIRECTION_EGRESS && (rules->flags & RULES_DEPART))
		depart(skb, rules, now, ahead);
	return false;
}

/* The two bits beside the DSCP, which congestion is told by, stay. */
INLINE void mark(struct __sk_buff *skb, const struct frame *f, u32 dscp)
{
	u32 at = f->network;
	u16 before, after;

	if (!at || dscp > DSCP_MAX || dscp == f->dscp || !fetch_u16(skb, at, &before))
		return;
	if (f->version == 4) {
		after = (before & BIG_ENDIAN_16(0xff03)) | BIG_ENDIAN_16(dscp << 2);
		bpf_l3_csum_replace(skb, at + 10, before, after, sizeof(after));
		bpf_skb_store_bytes(skb, at, &after, sizeof(after), 0);
	} else {
		after = (before & ~BIG_ENDIAN_16(IPV6_CLASS_AT_MOST)) | BIG_ENDIAN_16(dscp << 6);
		bpf_skb_store_bytes(skb, at, &after, sizeof(after), BPF_F_RECOMPUTE_CSUM);
	}
}

INLINE int enforce(struct __sk_buff *skb, const struct frame *f, const struct rules *rules, u32 slot,
		   enum direction direction, const struct counted *counted)
{
	if (rules->queues[direction])
		skb->priority = rules->queues[direction] | (KND_LEAF + counted->class);
	if (direction == DIRECTION_EGRESS && (rules->flags & RULES_MARK))
		mark(skb, f, rules->mark[bounded(counted->class, 7)]);
	/* Last, as it has many ends: the verifier follows each of them through all that comes after. */
	if (dropped(skb, rules, slot, direction, counted))
		return TC_ACT_SHOT;
	return direction == DIRECTION_INGRESS && rules->detour ? bpf_redirect(rules->detour, 0) : TC_ACT_UNSPEC;
}

INLINE int pass(struct __sk_buff *skb, u32 constant, enum direction direction)
{
	bool ipoib = constant & KND_IPOIB, any;
	u32 slot = constant & ~(u32)KND_IPOIB;
	struct counted counted = {};
	struct rules *rules;
	struct frame f = {};

	rules = bpf_map_lookup_elem((void *)bpf_pseudo_fd(KND_PSEUDO_MAP_FD, KND_MAP_RULES), &slot);
	any = rules && rules->flags;
	/* Nearly all packets of nearly all pods: half of what the long way costs, which would find the same. */
	if (likely(!any && !ipoib && !skb->gso_size && is_plain(skb, &f))) {
		counted.class = bounded(class_of(&f), 7);
		counted.bytes = skb->len;
		counted.packets = 1;
		add(slot, direction, f.kind, &counted);
		return TC_ACT_UNSPEC;
	}
	f = (struct frame){};
	dissect(skb, &f, ipoib);
	counted.class = bounded(any && (rules->flags & RULES_ONE_CLASS) ? rules->class : class_of(&f), 7);
	measure(skb, &f, &counted);
	add(slot, direction, f.kind, &counted);
	return any ? enforce(skb, &f, rules, slot, direction, &counted) : TC_ACT_UNSPEC;
}

#endif
