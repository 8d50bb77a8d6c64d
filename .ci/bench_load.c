/* The load generator of .ci/bench: one thread, epoll, every answer checked to its last byte.
 *
 *   bench_load PORT PATH DIALECT PIECES BODY DELTAS CONNECTIONS SECONDS STARTS [HEADER...]
 *
 * Sends the request in the file BODY again and again on CONNECTIONS connections for SECONDS and
 * prints one line of JSON: counts in all, rates within SECONDS, and times. Answers under way at the
 * end are waited for and checked, but what comes of them then is not in the rates.
 * DIALECT says what comes back:
 *   chat      one JSON chat completion
 *   chunks    a chat completion stream, ended by "data: [DONE]"
 *   response  one JSON Response
 *   events    a Responses stream, ended by response.completed, which says the whole text again
 *   messages  a Messages stream, ended by message_stop
 * The answer's text must be the first DELTAS lines of PIECES (JSON strings, taken in turn), a
 * stream must bring it in just as many deltas, and it must end properly: anything else is shown on
 * standard error and ends the run with status 1. A connection is kept when the server keeps it.
 *
 * STARTS is 0, or this is about paced streams: then each connection asks once, at most STARTS of
 * them begin in a second, and SECONDS run from shortly after all have. Lines "begin" and "end" say
 * when that is, for whoever measures something else meanwhile; at the end they must tell the
 * upstream to stop. A delta's text must end in the time that bench_upstream made it, which gives
 * its delay; DELTAS is the most that may come. Status 3: not all streams began, and soon.
 * HEADER: more of the request's.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum dialect { CHAT, RESPONSE, CHUNKS, EVENTS, MESSAGES, DIALECTS };
static const char *const DIALECT_NAMES[] = {"chat", "response", "chunks", "events", "messages"};
enum framing { BY_LENGTH, BY_CHUNKS, BY_CLOSE };
enum state { CONNECTING, SENDING, HEAD, BODY, CHUNK_SIZE, CHUNK_END, TRAILER, IDLE, CLOSED };
enum { HEAD_ROOM = 1 << 16, FORM_ROOM = 1024, GRACE = 30, STARTING = 4, STAMP_DIGITS = 16 };
static const char STAMP_DIGIT = 1;      /* in the expected text */
static const double NEVER = 1e18, TIME_TO_BEGIN = 6, SETTLING = 0.25;     /* seconds */

struct connection {
    int fd;
    enum state state;
    enum framing framing;
    int keep, watching;
    size_t sent;                /* of the request */
    char head[HEAD_ROOM];
    size_t head_len, left;      /* left: of the body, or of the chunk */
    char *body;                 /* decoded, not yet understood: an event's line, or all of JSON */
    size_t body_len, body_room;
    size_t text_at;             /* how much of the expected text has come */
    long deltas, finishes, ends, numbered;
    double began, first_text, stamp;
    char before[FORM_ROOM], after[FORM_ROOM];   /* what stood around the last delta's text */
    size_t before_len, after_len;
};

static int port, poller;
static enum dialect dialect;
static int streamed;            /* whether that is a dialect of events */
static char *request;
static size_t request_len;
static char *expected;
static size_t expected_len;
static long expected_deltas;
static size_t *text_after;      /* of the expected text, so many deltas */
static double started_at, opened, deadline;     /* of all; of what is measured, and its end */
static double window;           /* SECONDS */
static int paced, count, begun; /* connections: in all, and those that got text */
static double current;          /* when the bytes being looked at came */
static int open_connections;

static struct samples { double *at; size_t len, room; } latencies, first_texts, delays;
static long requests, events, connects;         /* in all */
static long requests_in_time, events_in_time;   /* by the deadline */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void add_sample(struct samples *to, double value)
{
    if (to->len == to->room) {
        to->room = to->room * 2 + 4096;
        to->at = realloc(to->at, to->room * sizeof *to->at);
    }
    to->at[to->len++] = value;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile_us(struct samples *of, double q)
{
    if (!of->len) return 0;
    qsort(of->at, of->len, sizeof *of->at, by_value);
    return of->at[(size_t)(q * (double)(of->len - 1))] * 1e6;
}

static void __attribute__((noreturn)) fail(struct connection *c, const char *what)
{
    fprintf(stderr, "bench_load: WRONG ANSWER on port %d: %s", port, what);
    if (c) {
        fprintf(stderr, " (%ld of %ld deltas, %zu of %zu bytes of text)",
            c->deltas, expected_deltas, c->text_at, expected_len);
        if (c->head_len)
            fprintf(stderr, "\n%.*s", (int)(c->head_len < 1500 ? c->head_len : 1500), c->head);
        if (c->body_len)
            fprintf(stderr, "\n%.*s", (int)(c->body_len < 600 ? c->body_len : 600), c->body);
    }
    fprintf(stderr, "\n");
    exit(1);
}

/* ---- what is in an answer ------------------------------------------------------------------ */

static unsigned hex4(const char *at)
{
    char digits[5] = {at[0], at[1], at[2], at[3], 0};
    return (unsigned)strtoul(digits, NULL, 16);
}

static size_t utf8(unsigned code, char *to)
{
    if (code < 0x80) return to[0] = (char)code, 1;
    if (code < 0x800)
        return to[0] = (char)(0xc0 | code >> 6), to[1] = (char)(0x80 | (code & 63)), 2;
    if (code < 0x10000)
        return to[0] = (char)(0xe0 | code >> 12), to[1] = (char)(0x80 | (code >> 6 & 63)),
               to[2] = (char)(0x80 | (code & 63)), 3;
    return to[0] = (char)(0xf0 | code >> 18), to[1] = (char)(0x80 | (code >> 12 & 63)),
           to[2] = (char)(0x80 | (code >> 6 & 63)), to[3] = (char)(0x80 | (code & 63)), 4;
}

/* Decodes the JSON string whose first character (after the quote) is at `at`. Each piece of it
 * goes to `take`. Returns where the closing quote is, NULL when the string is wrong. */
static const char *json_string(const char *at, const char *end, void *to,
    int (*take)(void *to, const char *piece, size_t len))
{
    while (at < end) {
        const char *run = at;
        while (at < end && *at != '"' && *at != '\\') at++;
        if (at > run && !take(to, run, (size_t)(at - run))) return NULL;
        if (at >= end) return NULL;
        if (*at == '"') return at;
        if (end - at < 2) return NULL;
        static const char from[] = "\"\\/bfnrt", as[] = "\"\\/\b\f\n\r\t";
        const char *simple = strchr(from, at[1]);
        char piece[4];
        size_t len;
        if (simple && *simple) {
            piece[0] = as[simple - from];
            len = 1;
            at += 2;
        } else if (at[1] == 'u' && end - at >= 6) {
            unsigned code = hex4(at + 2);
            at += 6;
            if (code >> 10 == 0x36 && end - at >= 6 && at[0] == '\\' && at[1] == 'u') {
                code = 0x10000 + ((code & 1023) << 10) + (hex4(at + 2) & 1023);
                at += 6;
            }
            len = utf8(code, piece);
        } else return NULL;
        if (!take(to, piece, len)) return NULL;
    }
    return NULL;
}

static int compare_text(void *to, const char *piece, size_t len)
{
    struct connection *c = to;
    const char *want = expected + c->text_at;
    if (len > expected_len - c->text_at) return 0;
    c->text_at += len;
    if (!paced) return !memcmp(want, piece, len);
    for (size_t i = 0; i < len; i++) {
        if (want[i] == STAMP_DIGIT && piece[i] >= '0' && piece[i] <= '9')
            c->stamp = c->stamp * 10 + (piece[i] - '0');
        else if (want[i] != piece[i]) return 0;
    }
    return 1;
}

static int append_expected(void *to, const char *piece, size_t len)
{
    size_t *room = to;
    if (expected_len + len > *room) {
        *room = (expected_len + len) * 2;
        expected = realloc(expected, *room);
    }
    memcpy(expected + expected_len, piece, len);
    expected_len += len;
    return 1;
}

/* Where the string value of the first `"key":` behind `at` begins, NULL when there is none. */
static const char *string_of(const char *at, const char *end, const char *key)
{
    size_t len = strlen(key);
    while ((at = memmem(at, (size_t)(end - at), key, len))) {
        at += len;
        const char *value = at;
        while (value < end && (*value == ' ' || *value == ':')) value++;
        if (value > at && value < end && *value == '"') return value + 1;
    }
    return NULL;
}

static void count_delta(struct connection *c)
{
    c->deltas++;
    events++;
    double at = paced ? c->stamp / 1e6 : current;  /* paced: one that was held up counts, too */
    if (at >= opened && at < deadline) {
        events_in_time++;
        if (paced) add_sample(&delays, current - at);
    }
    c->stamp = 0;
    if (c->first_text) return;
    c->first_text = current;
    if (++begun == count && paced) deadline = (opened = current + SETTLING) + window;
}

static void take_text(struct connection *c, const char *line, const char *end, const char *text)
{
    const char *begin = text, *close;
    size_t was = c->text_at;
    close = json_string(text, end, c, compare_text);
    if (!close) fail(c, "this is not the text that comes next");
    if (c->text_at > was) count_delta(c);
    c->before_len = c->after_len = 0;
    if (begin - line <= FORM_ROOM && end - close <= FORM_ROOM) {
        memcpy(c->before, line, c->before_len = (size_t)(begin - line));
        memcpy(c->after, close, c->after_len = (size_t)(end - close));
    }
}

/* Whether two ends of a line differ in nothing but spaces. */
static int same_tail(const char *a, const char *a_end, const char *b, const char *b_end)
{
    for (;;) {
        while (a < a_end && *a == ' ') a++;
        while (b < b_end && *b == ' ') b++;
        if (a == a_end || b == b_end) return a == a_end && b == b_end;
        if (*a++ != *b++) return 0;
    }
}

/* A delta that looks as the last one did around its text: no need to search it. */
static int take_same_form(struct connection *c, const char *line, const char *end)
{
    if (!c->after_len || (size_t)(end - line) <= c->before_len
        || memcmp(line, c->before, c->before_len))
        return 0;
    size_t was = c->text_at;
    const char *close = json_string(line + c->before_len, end, c, compare_text);
    if (!close) fail(c, "this is not the text that comes next");
    if (!same_tail(close, end, c->after, c->after + c->after_len)) {
        c->text_at = was;       /* such as a delta that brings the finish reason too */
        c->stamp = 0;
        return 0;
    }
    if (c->text_at > was) count_delta(c);
    return 1;
}

/* A finished Response: in an answer of its own, or in the event that ends a stream. */
static void take_response(struct connection *c, const char *at, const char *end)
{
    const char *status = string_of(at, end, "\"status\"");
    if (!status || strncmp(status, "completed\"", 10)) fail(c, "status is not completed");
    const char *part = memmem(at, (size_t)(end - at), "\"output_text\"", 13);
    const char *text = part ? string_of(part, end, "\"text\"") : NULL;
    if (!text) fail(c, "no output text in it");
    c->text_at = 0;
    if (!json_string(text, end, c, compare_text)) fail(c, "another text than expected");
}

/* An event of a Responses stream. Its number differs from the last one's: the form begins there. */
static void take_event(struct connection *c, const char *line, const char *end)
{
    static const char number[] = "\"sequence_number\":";
    const char *type = string_of(line, end, "\"type\"");
    const char *at = memmem(line, (size_t)(end - line), number, sizeof number - 1);
    char *rest;
    if (!type || !at) fail(c, "an event without type or sequence_number");
    if (strtol(at + sizeof number - 1, &rest, 10) != c->numbered++)
        fail(c, "not the sequence_number that comes next");
    if (!strncmp(type, "response.output_text.delta\"", 27)) {
        if (take_same_form(c, rest, end)) return;
        at = string_of(rest, end, "\"delta\"");
        if (!at) fail(c, "a delta without text");
        take_text(c, rest, end, at);
    } else if (!strncmp(type, "response.output_text.done\"", 26)) c->finishes++;
    else if (!strncmp(type, "response.completed\"", 19)) {
        if (c->text_at != expected_len) fail(c, "text is missing");
        take_response(c, line, end);
        c->ends++;
    }
}

static void take_line(struct connection *c, const char *line, const char *end)
{
    if (end > line && end[-1] == '\r') end--;
    if (end - line < 6 || memcmp(line, "data: ", 6)) return;
    if (c->ends) fail(c, "an event after the end of the stream");
    if (dialect == EVENTS) {
        take_event(c, line, end);
        return;
    }
    if (take_same_form(c, line, end)) return;
    size_t len = (size_t)(end - line);
    const char *at;
    if (dialect == CHUNKS) {
        if (len == 12 && !memcmp(line, "data: [DONE]", 12)) {
            c->ends++;
            return;
        }
        at = string_of(line, end, "\"finish_reason\"");
        if (at) {
            if (strncmp(at, "stop\"", 5)) fail(c, "finish_reason is not stop");
            c->finishes++;
        }
        const char *delta = memmem(line, len, "\"delta\"", 7);
        at = delta ? string_of(delta, end, "\"content\"") : NULL;
        if (at) {
            int last = c->finishes > 0;
            take_text(c, line, end, at);
            if (last) c->after_len = 0;
        }
        if (memmem(line, len, "\"error\"", 7)) fail(c, "an error in the stream");
    } else {
        if (memmem(line, len, "\"text_delta\"", 12)) {
            at = string_of(line, end, "\"text\"");
            if (at) take_text(c, line, end, at);
        } else if (memmem(line, len, "\"stop_reason\":\"end_turn\"", 24)) c->finishes++;
        else if (memmem(line, len, "\"message_stop\"", 14)) c->ends++;
    }
}

static void take_body(struct connection *c, const char *at, size_t len)
{
    if (c->body_len + len > c->body_room) {
        c->body_room = (c->body_len + len) * 2;
        c->body = realloc(c->body, c->body_room);
    }
    memcpy(c->body + c->body_len, at, len);
    c->body_len += len;
    if (!streamed) return;
    const char *line = c->body, *end = c->body + c->body_len, *newline;
    while ((newline = memchr(line, '\n', (size_t)(end - line)))) {
        take_line(c, line, newline);
        line = newline + 1;
    }
    c->body_len = (size_t)(end - line);
    memmove(c->body, line, c->body_len);
}

static void check_whole(struct connection *c)
{
    if (dialect == CHAT) {
        const char *end = c->body + c->body_len;
        const char *message = memmem(c->body, c->body_len, "\"message\"", 9);
        const char *text = message ? string_of(message, end, "\"content\"") : NULL;
        if (!text) fail(c, "no content in it");
        if (!json_string(text, end, c, compare_text)) fail(c, "another text than expected");
        const char *finish = string_of(c->body, end, "\"finish_reason\"");
        if (!finish || strncmp(finish, "stop\"", 5)) fail(c, "finish_reason is not stop");
    } else if (dialect == RESPONSE) take_response(c, c->body, c->body + c->body_len);
    else {
        if (c->finishes != 1) fail(c, "not exactly one finish reason");
        if (c->ends != 1) fail(c, "the stream did not end as it must");
    }
    if (c->text_at != (paced ? text_after[c->deltas] : expected_len)) fail(c, "text is missing");
    if (streamed && !paced && c->deltas != expected_deltas)
        fail(c, "another number of deltas than upstream sent");
}

/* ---- HTTP ---------------------------------------------------------------------------------- */

static void watch(struct connection *c, int events_wanted)
{
    struct epoll_event event = {.events = (uint32_t)events_wanted, .data.ptr = c};
    if (c->watching == events_wanted) return;
    epoll_ctl(poller, c->watching ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->fd, &event);
    c->watching = events_wanted;
}

static void send_request(struct connection *c)
{
    while (c->sent < request_len) {
        ssize_t sent = send(c->fd, request + c->sent, request_len - c->sent, 0);
        if (sent < 0 && errno == EAGAIN) {
            watch(c, EPOLLIN | EPOLLOUT);
            return;
        }
        if (sent < 0) fail(c, strerror(errno));
        c->sent += (size_t)sent;
    }
    c->state = HEAD;
    watch(c, EPOLLIN);
}

static void begin(struct connection *c)
{
    c->began = now();
    c->sent = c->head_len = c->body_len = c->text_at = c->left = 0;
    c->deltas = c->finishes = c->ends = c->numbered = 0;
    c->first_text = 0;
    if (c->state == IDLE) {
        c->state = SENDING;
        send_request(c);
        return;
    }
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) fail(NULL, strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    connects++;
    c->watching = 0;
    c->state = CONNECTING;
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS)
        fail(NULL, strerror(errno));
    watch(c, EPOLLOUT);
}

static void hang_up(struct connection *c)
{
    close(c->fd);
    c->state = CLOSED;
}

static void __attribute__((noreturn)) cannot_keep_up(void)
{
    fprintf(stderr, "bench_load: cannot keep up: %d of %d streams began\n", begun, count);
    exit(3);
}

/* Says when the time begins that is measured, and when it ends. */
static void announce(double at)
{
    static int announced;
    static const char *const words[] = {"begin", "end"};
    const double times[] = {opened, deadline};
    if (begun < count && at > started_at + TIME_TO_BEGIN) cannot_keep_up();
    if (announced > 1 || begun < count || at < times[announced]) return;
    puts(words[announced++]);
    fflush(stdout);
}

static void finish(struct connection *c)
{
    check_whole(c);
    double end = now();
    if (paced && end < deadline) cannot_keep_up();
    add_sample(&latencies, end - c->began);
    if (c->first_text) add_sample(&first_texts, c->first_text - c->began);
    requests++;
    requests_in_time += end < deadline;
    if (c->keep) c->state = IDLE;
    else hang_up(c);
    if (end < deadline) begin(c);
    else {
        if (c->keep) hang_up(c);
        open_connections--;
    }
}

static const char *header(struct connection *c, const char *name)
{
    const char *line = c->head;
    size_t len = strlen(name);
    while ((line = strchr(line, '\n'))) {
        line++;
        if (!strncasecmp(line, name, len) && line[len] == ':')
            return line + len + 1 + strspn(line + len + 1, " \t");
    }
    return NULL;
}

static void read_head(struct connection *c)
{
    int newer = !strncmp(c->head, "HTTP/1.1 ", 9);
    if (!newer && strncmp(c->head, "HTTP/1.0 ", 9)) fail(c, "not HTTP");
    if (strncmp(c->head + 9, "200", 3)) fail(c, "not 200");
    const char *length = header(c, "content-length");
    const char *coding = header(c, "transfer-encoding");
    const char *connection = header(c, "connection");
    c->keep = newer ? !(connection && !strncasecmp(connection, "close", 5))
                    : connection && !strncasecmp(connection, "keep-alive", 10);
    if (coding && !strncasecmp(coding, "chunked", 7)) {
        c->framing = BY_CHUNKS;
        c->state = CHUNK_SIZE;
    } else if (length) {
        c->framing = BY_LENGTH;
        c->left = strtoul(length, NULL, 10);
        c->state = BODY;
    } else {
        c->framing = BY_CLOSE;
        c->keep = 0;
        c->state = BODY;
    }
}

/* Takes a line of chunked coding over several reads into `head`; 1 when it is whole. */
static int take_size_line(struct connection *c, const char **at, const char *end)
{
    while (*at < end) {
        char byte = *(*at)++;
        if (c->head_len >= HEAD_ROOM - 1) fail(c, "an endless chunk size");
        c->head[c->head_len++] = byte;
        if (byte == '\n') {
            c->head[c->head_len] = 0;
            return 1;
        }
    }
    return 0;
}

static void feed(struct connection *c, const char *at, size_t len)
{
    const char *end = at + len;
    while (at < end) {
        size_t have = (size_t)(end - at);
        if (c->state == HEAD) {
            size_t take = have < HEAD_ROOM - 1 - c->head_len ? have : HEAD_ROOM - 1 - c->head_len;
            size_t was = c->head_len;
            memcpy(c->head + was, at, take);
            c->head_len += take;
            c->head[c->head_len] = 0;
            char *blank = strstr(c->head, "\r\n\r\n");
            if (!blank) {
                if (c->head_len >= HEAD_ROOM - 1) fail(c, "an endless head");
                return;
            }
            size_t head_len = (size_t)(blank - c->head) + 4;
            at += head_len - was;
            c->head[c->head_len = head_len] = 0;
            read_head(c);
            if (c->framing == BY_CHUNKS) c->head_len = 0;
        } else if (c->state == BODY) {
            size_t take = c->framing == BY_CLOSE || have < c->left ? have : c->left;
            take_body(c, at, take);
            at += take;
            if (c->framing == BY_CLOSE) continue;
            c->left -= take;
            if (c->left) continue;
            if (c->framing == BY_CHUNKS) {
                c->state = CHUNK_END;
                c->left = 2;
            } else if (at < end) fail(c, "bytes behind the answer");
            else finish(c);
        } else if (c->state == CHUNK_END) {
            at++;
            if (!--c->left) c->state = CHUNK_SIZE;
        } else if (c->state == CHUNK_SIZE) {
            if (!take_size_line(c, &at, end)) return;
            char *stop;
            c->left = strtoul(c->head, &stop, 16);
            if (stop == c->head) fail(c, "not a chunk size");
            c->head_len = 0;
            c->state = c->left ? BODY : TRAILER;
        } else if (c->state == TRAILER) {
            if (!take_size_line(c, &at, end)) return;
            int blank = c->head_len <= 2;
            c->head_len = 0;
            if (!blank) continue;
            if (at < end) fail(c, "bytes behind the answer");
            finish(c);
        } else fail(c, "bytes that nobody asked for");
    }
}

static void ready(struct connection *c, unsigned happened)
{
    static char buffer[1 << 18];
    if (c->state == CLOSED) return;
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t len = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &len);
        if (error) fail(c, strerror(error));
        c->state = SENDING;
    }
    if (c->state == SENDING) {
        send_request(c);
        return;
    }
    if (!(happened & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
    ssize_t got = recv(c->fd, buffer, sizeof buffer, 0);
    current = now();
    if (got < 0) {
        if (errno != EAGAIN) fail(c, strerror(errno));
    } else if (got > 0) feed(c, buffer, (size_t)got);
    else if (c->state == BODY && c->framing == BY_CLOSE) finish(c);
    else fail(c, "the connection ended too early");
}

/* ---- arguments ----------------------------------------------------------------------------- */

static void read_expected(const char *path)
{
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t line_room = 0, room = 0;
    ssize_t len;
    if (!file) fail(NULL, path);
    text_after = calloc((size_t)expected_deltas + 1, sizeof *text_after);
    for (long i = 0; i < expected_deltas; i++, text_after[i] = expected_len) {
        if ((len = getline(&line, &line_room, file)) <= 0) {
            rewind(file);
            if ((len = getline(&line, &line_room, file)) <= 0) fail(NULL, "no pieces");
        }
        if (!json_string(line + 1, line + len, &room, append_expected)) fail(NULL, "a bad piece");
        if (!paced) continue;
        append_expected(&room, " ", 1);
        for (int digit = 0; digit < STAMP_DIGITS; digit++) append_expected(&room, &STAMP_DIGIT, 1);
    }
    free(line);
    fclose(file);
}

static void make_request(const char *path, const char *body_path, char **headers)
{
    char more[2048] = "";
    for (; *headers; headers++) {
        if (strlen(more) + strlen(*headers) + 3 > sizeof more) fail(NULL, "too many headers");
        strcat(strcat(more, *headers), "\r\n");
    }
    FILE *file = fopen(body_path, "rb");
    if (!file) fail(NULL, body_path);
    fseek(file, 0, SEEK_END);
    size_t body_len = (size_t)ftell(file);
    rewind(file);
    request = malloc(body_len + 4096);
    int head_len = snprintf(request, 4096,
        "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: application/json\r\n"
        "Content-Type: application/json\r\nAuthorization: Bearer sk-bench\r\n"
        "User-Agent: OpenAI/Python 3.52.0\r\n%sContent-Length: %zu\r\n\r\n",
        path, port, more, body_len);
    if (fread(request + head_len, 1, body_len, file) != body_len) fail(NULL, body_path);
    request_len = (size_t)head_len + body_len;
    fclose(file);
}

/* Does without those that no server has taken yet: they may wait for seconds where a backlog is
 * full. */
static void leave_backlog(struct connection *connections)
{
    for (int i = 0; i < count; i++) {
        if (connections[i].state != CONNECTING) continue;
        hang_up(&connections[i]);
        open_connections--;
    }
}

/* Lets streams begin, only few of them before they got text: no server's backlog overflows. */
static int start_some(struct connection *connections, int started, double starts)
{
    while (started < count
           && (!paced || (started < begun + STARTING && now() >= started_at + started / starts)))
        begin(&connections[started++]);
    return started;
}

int main(int argc, char **argv)
{
    while (argc > 9 && dialect < DIALECTS && strcmp(argv[3], DIALECT_NAMES[dialect])) dialect++;
    if (argc < 10 || dialect == DIALECTS) {
        fprintf(stderr, "usage: bench_load PORT PATH chat|response|chunks|events|messages PIECES "
                        "BODY DELTAS CONNECTIONS SECONDS STARTS [HEADER...]\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    port = atoi(argv[1]);
    streamed = dialect >= CHUNKS;
    expected_deltas = atol(argv[6]);
    count = atoi(argv[7]);
    window = atof(argv[8]);
    double starts = atof(argv[9]);
    paced = starts > 0;
    read_expected(argv[4]);
    make_request(argv[2], argv[5], argv + 10);

    poller = epoll_create1(0);
    struct connection *connections = calloc((size_t)count, sizeof *connections);
    struct epoll_event happened[256];
    started_at = now();
    double give_up = started_at + window + GRACE;
    opened = paced ? NEVER : started_at;
    deadline = opened + window;
    open_connections = count;
    for (int i = 0; i < count; i++) connections[i].state = CLOSED;
    int started = start_some(connections, 0, starts);
    while (open_connections > 0) {
        int n = epoll_wait(poller, happened, 256, paced ? 1 : 100);
        for (int i = 0; i < n; i++) ready(happened[i].data.ptr, happened[i].events);
        started = start_some(connections, started, starts);
        if (paced) announce(now());
        else if (now() >= deadline) leave_backlog(connections);
        if (now() > give_up) fail(NULL, "answers do not come to an end");
    }
    printf("{\"requests\":%ld,\"events\":%ld,\"connects\":%ld,\"events_in_time\":%ld,"
           "\"requests_per_s\":%.3f,\"events_per_s\":%.3f,"
           "\"p50_us\":%.1f,\"p99_us\":%.1f,\"first_p50_us\":%.1f,\"first_p99_us\":%.1f,"
           "\"delay_p50_us\":%.1f,\"delay_p99_us\":%.1f}\n",
        requests, events, connects, events_in_time,
        (double)requests_in_time / window, (double)events_in_time / window,
        quantile_us(&latencies, 0.5), quantile_us(&latencies, 0.99),
        quantile_us(&first_texts, 0.5), quantile_us(&first_texts, 0.99),
        quantile_us(&delays, 0.5), quantile_us(&delays, 0.99));
    return 0;
}
