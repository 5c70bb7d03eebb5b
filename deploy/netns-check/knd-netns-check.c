/* SPDX-License-Identifier: Apache-2.0
 *
 * knd-netns-check: an OCI createRuntime hook that holds a container back unless its network namespace
 * is one in which the devices of its claim are attached now.
 *
 *   knd-netns-check LIVE_FILE < OCI-state
 *
 * LIVE_FILE has one network namespace cookie a line (SO_NETNS_COOKIE, decimal). The namespace is that
 * of the process named by the state's top-level "pid". A line may also say what must hold in /sys for the
 * claim's device files to be still those of its devices: "is FILE TEXT", or "at LINK NAME" for the last
 * part of where a link points.
 *
 * Invariant: the exit status is 0 only after a match, and if all of /sys is as told. Everything else, whatever it is, ends in 1 with
 * one sentence on standard error, which the runtime shows to the user. No agent needs to be running.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71
#endif

/* Annotations can make a state large: 256 KiB of them, each byte escaped to six. */
#define STATE_MAX (4u << 20)
#define LIVE_MAX (64u << 10)
#define DEPTH_MAX 64

static char state_buffer[STATE_MAX + 1];
static char live_buffer[LIVE_MAX + 1];

__attribute__((noreturn, format(printf, 1, 2))) static void refuse(const char *format, ...)
{
	va_list arguments;

	fputs("knd-netns-check: ", stderr);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(EXIT_FAILURE);
}

/* Reads all of fd into buffer, which has room for limit + 1 bytes. Returns the length. */
static size_t read_all(int fd, char *buffer, size_t limit, const char *what)
{
	size_t length = 0;

	for (;;) {
		ssize_t got = read(fd, buffer + length, limit + 1 - length);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			refuse("%s cannot be read: %s", what, strerror(errno));
		if (got == 0)
			return length;
		length += (size_t)got;
		if (length > limit)
			refuse("%s is larger than %zu bytes", what, limit);
	}
}

/* --- the OCI state: JSON, of which only the top-level "pid" matters --------------------------------- */

struct json {
	const char *at;
	const char *end;
	long pid; /* 0 until found */
};

__attribute__((noreturn)) static void bad_state(const char *why)
{
	refuse("the OCI state on standard input %s", why);
}

static void skip_space(struct json *json)
{
	while (json->at < json->end && memchr(" \t\r\n", *json->at, 4))
		json->at++;
}

/* The next character that is not white space; not consumed. */
static char peek(struct json *json)
{
	skip_space(json);
	if (json->at == json->end)
		bad_state("ends too early");
	return *json->at;
}

static void expect(struct json *json, char wanted)
{
	if (peek(json) != wanted)
		bad_state("is not JSON");
	json->at++;
}

/* Whether a comma follows, so that another item does; consumes it, or else the closing character. */
static bool another(struct json *json, char closing)
{
	char next = peek(json);

	if (next != ',' && next != closing)
		bad_state("is not JSON");
	json->at++;
	return next == ',';
}

/* Skips a string and returns whether its text is exactly `wanted`, without escapes. */
static bool string_is(struct json *json, const char *wanted)
{
	const char *start;

	expect(json, '"');
	start = json->at;
	for (;; json->at++) {
		if (json->at == json->end)
			bad_state("ends too early");
		if ((unsigned char)*json->at < 0x20)
			bad_state("is not JSON");
		if (*json->at == '"')
			break;
		if (*json->at == '\\' && ++json->at == json->end)
			bad_state("ends too early");
	}
	json->at++;
	return (size_t)(json->at - 1 - start) == strlen(wanted) && !memcmp(start, wanted, strlen(wanted));
}

/* A number or one of true, false, null: what it is in detail does not matter here. */
static void skip_word(struct json *json)
{
	const char *start = json->at;

	while (json->at < json->end &&
	       strchr("+-.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", *json->at) &&
	       *json->at)
		json->at++;
	if (json->at == start)
		bad_state("is not JSON");
}

static void read_pid(struct json *json)
{
	const char *start;

	if (json->pid)
		bad_state("has two pids");
	peek(json);
	start = json->at;
	while (json->at < json->end && *json->at >= '0' && *json->at <= '9') {
		json->pid = json->pid * 10 + (*json->at++ - '0');
		if (json->pid > INT_MAX)
			bad_state("has a pid that is none");
	}
	if (json->at == start || *start == '0' || !strchr(",}", peek(json)))
		bad_state("has a pid that is none");
}

static void skip_value(struct json *json, int depth);

/* An object; at depth 1 it is the state itself, whose pid is kept. */
static void read_object(struct json *json, int depth)
{
	expect(json, '{');
	if (peek(json) == '}') {
		json->at++;
		return;
	}
	do {
		bool is_pid = string_is(json, "pid") && depth == 1;

		expect(json, ':');
		if (is_pid)
			read_pid(json);
		else
			skip_value(json, depth + 1);
	} while (another(json, '}'));
}

static void skip_array(struct json *json, int depth)
{
	expect(json, '[');
	if (peek(json) == ']') {
		json->at++;
		return;
	}
	do {
		skip_value(json, depth + 1);
	} while (another(json, ']'));
}

static void skip_value(struct json *json, int depth)
{
	if (depth > DEPTH_MAX)
		bad_state("is nested too deeply");
	switch (peek(json)) {
	case '{':
		read_object(json, depth);
		break;
	case '[':
		skip_array(json, depth);
		break;
	case '"':
		string_is(json, "");
		break;
	default:
		skip_word(json);
	}
}

static long pid_of_state(const char *text, size_t length)
{
	struct json json = { .at = text, .end = text + length, .pid = 0 };

	read_object(&json, 1);
	skip_space(&json);
	if (json.at != json.end)
		bad_state("has something after its end");
	if (!json.pid)
		bad_state("has no pid");
	return json.pid;
}

/* --- the container's network namespace -------------------------------------------------------------- */

/* Enters the namespace for good: this process does nothing else. */
static uint64_t netns_cookie_of(long pid)
{
	char path[64];
	uint64_t cookie = 0;
	socklen_t length = sizeof(cookie);
	int netns, probe;

	snprintf(path, sizeof(path), "/proc/%ld/ns/net", pid);
	netns = open(path, O_RDONLY | O_CLOEXEC);
	if (netns < 0)
		refuse("the container's network namespace %s cannot be opened: %s", path, strerror(errno));
	if (setns(netns, CLONE_NEWNET))
		refuse("the container's network namespace %s cannot be entered: %s", path, strerror(errno));
	probe = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (probe < 0)
		refuse("no socket can be opened in the container's network namespace: %s", strerror(errno));
	if (getsockopt(probe, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &length))
		refuse("the kernel does not tell network namespaces apart (SO_NETNS_COOKIE, Linux 5.14): %s",
		       strerror(errno));
	if (length != sizeof(cookie) || !cookie)
		refuse("the kernel gave no cookie for the container's network namespace");
	return cookie;
}

/* --- the live file ----------------------------------------------------------------------------------- */

static void open_live(const char *path, int *fd)
{
	struct stat status;

	*fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
	if (*fd < 0 && errno == ENOENT)
		refuse("the devices of this container's claim are not attached (no %s); "
		       "it starts once the knd agent has attached them", path);
	if (*fd < 0)
		refuse("%s cannot be opened: %s", path, strerror(errno));
	if (fstat(*fd, &status))
		refuse("%s cannot be examined: %s", path, strerror(errno));
	if (!S_ISREG(status.st_mode))
		refuse("%s is not a regular file", path);
	if ((status.st_uid != 0 && status.st_uid != geteuid()) || (status.st_mode & (S_IWGRP | S_IWOTH)))
		refuse("%s can be written by others than root and is not believed", path);
}

__attribute__((noreturn)) static void damaged(const char *path)
{
	refuse("%s is damaged; the knd agent writes it anew when it attaches a device", path);
}

/* What a file below /sys says, or the last part of where a link points, without a final newline; "" if
 * it is not there. */
static const char *in_sys(bool link, const char *file, char *buffer, size_t size)
{
	ssize_t got = -1;
	char *slash;

	if (link) {
		got = readlink(file, buffer, size - 1);
	} else {
		int fd = open(file, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

		if (fd >= 0) {
			got = read(fd, buffer, size - 1);
			close(fd);
		}
	}
	buffer[got > 0 ? got : 0] = '\0';
	buffer[strcspn(buffer, "\n")] = '\0';
	slash = link ? strrchr(buffer, '/') : NULL;
	return slash ? slash + 1 : buffer;
}

/* A line that is no cookie: refuses the container unless it holds. Numbers of device files are given anew
 * when a driver begins anew with its devices, and another tenant's could be behind them by now. */
static void check_line(const char *text, size_t length, const char *path)
{
	char line[512], file[sizeof(line) + 8], buffer[PATH_MAX];
	const char *found;
	char *value;

	if (length < 4 || length >= sizeof(line) || memchr(text, '\0', length))
		damaged(path);
	memcpy(line, text, length);
	line[length] = '\0';
	value = strchr(line + 3, ' ');
	if ((strncmp(line, "is class/", 9) && strncmp(line, "at class/", 9)) || strstr(line, "..") || !value ||
	    !value[1] || strchr(value + 1, ' '))
		damaged(path);
	*value++ = '\0';
	snprintf(file, sizeof(file), "/sys/%s", line + 3);
	found = in_sys(line[0] == 'a', file, buffer, sizeof(buffer));
	if (strcmp(found, value))
		refuse("the device files of this container's claim are not its devices' any more (%s is \"%s\" "
		       "and was \"%s\"): delete the pod, so that another gets them", file, found, value);
}

/* Whether one line of text is exactly this cookie; every line that is none has to hold. A file that is not
 * whole lines is refused: a number cut short could be another namespace's. */
static bool lists_cookie(const char *text, size_t length, uint64_t cookie, const char *path)
{
	char wanted[24];
	size_t wanted_length = (size_t)snprintf(wanted, sizeof(wanted), "%llu", (unsigned long long)cookie);
	bool found = false;

	while (length) {
		const char *end = memchr(text, '\n', length);
		size_t line = end ? (size_t)(end - text) : 0;
		size_t digits = 0;

		while (digits < line && text[digits] >= '0' && text[digits] <= '9')
			digits++;
		if (!digits)
			check_line(text, line, path);
		else if (digits < line || line > 20 || *text == '0')
			damaged(path);
		else if (line == wanted_length && !memcmp(text, wanted, line))
			found = true;
		text += line + 1;
		length -= line + 1;
	}
	return found;
}

int main(int argc, char **argv)
{
	size_t state_length, live_length;
	uint64_t cookie;
	long pid;
	int live;

	if (argc != 2)
		refuse("needs one argument, the claim's live file, and the OCI state on standard input");
	state_length = read_all(STDIN_FILENO, state_buffer, STATE_MAX, "the OCI state on standard input");
	pid = pid_of_state(state_buffer, state_length);
	open_live(argv[1], &live);
	live_length = read_all(live, live_buffer, LIVE_MAX, argv[1]);
	cookie = netns_cookie_of(pid);
	if (!lists_cookie(live_buffer, live_length, cookie, argv[1]))
		refuse("the devices of this container's claim are not attached in its network namespace "
		       "(cookie %llu is not in %s); it starts once the knd agent has attached them",
		       (unsigned long long)cookie, argv[1]);
	return EXIT_SUCCESS;
}
