/** Auth0's signing keys: how calls are answered while keys cannot be fetched, change or are withdrawn. */
import assert from "node:assert/strict";
import type { ServerResponse } from "node:http";
import { after, afterEach, beforeEach, test, type TestContext } from "node:test";
import { createAuthenticator, describeError } from "../auth.ts";
import { logOf, post, type RunningServer, startServer } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";

const MINUTE = 60_000;

const tenant = await startTenant();
let server: RunningServer;
let hanging: ServerResponse[];

after(() => tenant.close());

beforeEach(async () => {
  hanging = [];
  tenant.answerJwks = undefined;
  server = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: "info" }); // knows no key yet
});

afterEach(async () => {
  hanging.forEach((response) => response.destroy());
  await server.close();
});

const signed = (claims = {}, header = {}) => tenant.sign({ aud: server.url, ...claims }, { header });

const send = (token: string) => post(server.url, token, "ping");

const statusOf = async (token: string) => (await send(token)).status;

/** Stops the clock, and gives what advances it. */
function stopClock(t: TestContext): (milliseconds: number) => void {
  let now = Date.now();
  t.mock.timers.enable({ apis: ["Date"], now });
  t.after(() => t.mock.timers.reset()); // which Deno leaves to the test
  return (milliseconds) => t.mock.timers.setTime(now += milliseconds);
}

const fail = (response: ServerResponse) => response.writeHead(500).end();

const FAULTS: Record<string, (response: ServerResponse) => void> = {
  "status 500": fail,
  "HTML with status 200": (response) => response.end("<!doctype html><title>Sorry</title>"),
  "JSON that is no key set": (response) => response.end('{"keys":"none"}'),
  "null": (response) => response.end("null"),
  "a redirect": (response) => response.writeHead(302, { location: "/elsewhere" }).end(),
  "a connection that is cut": (response) => response.destroy(),
  "half an answer": (response) => {
    response.writeHead(200, { "content-length": 1000 });
    response.write("{", () => response.destroy());
  },
};

for (const [fault, answer] of Object.entries(FAULTS)) {
  test(`${fault} in place of Auth0's signing keys gives 503, never 401, and good keys are used at once`, async (t) => {
    const log = logOf(t);
    tenant.answerJwks = answer;
    const token = await signed();
    const reply = await send(token);
    assert.equal(reply.status, 503);
    assert.match(reply.headers.get("retry-after") ?? "", /^\d+$/);
    assert.equal(reply.headers.get("www-authenticate"), null);
    assert.match(log.join(""), new RegExp(` 503 .*${tenant.issuer}\\.well-known/jwks\\.json.*: .+`));
    assert.doesNotMatch(log.join(""), /\n {4}at /);

    tenant.answerJwks = undefined;
    assert.equal(await statusOf(token), 200);
  });
}

test("the text of a failed fetch names each address that was tried", () => {
  const refused = ["::1", "127.0.0.1"].map((address) => new Error(`connect ECONNREFUSED ${address}`));
  const failure = new TypeError("fetch failed", { cause: new AggregateError(refused) });
  assert.equal(describeError(failure), "fetch failed: connect ECONNREFUSED ::1, connect ECONNREFUSED 127.0.0.1");
});

test("a call gets 503 where Auth0 cannot be reached", async (t) => {
  const gone = await startTenant();
  const lonely = await startServer({ AUTH0_DOMAIN: gone.origin });
  t.after(lonely.close);
  const token = await gone.sign({ aud: lonely.url });
  await gone.close();
  assert.equal((await post(lonely.url, token, "ping")).status, 503);
});

test("a call gets 503 in a few seconds where Auth0 does not answer, or stops in the middle", async (t) => {
  const { timeout } = AbortSignal;
  const { mock } = t.mock.method(AbortSignal, "timeout", () => timeout(50)); // instead of seconds
  const token = await signed();
  for (const start of ["", '{"keys":[']) {
    tenant.answerJwks = (response) => {
      hanging.push(response);
      if (start !== "") response.write(start);
    };
    assert.equal(await statusOf(token), 503);
  }
  for (const { arguments: [milliseconds] } of mock.calls) assert.ok(Number(milliseconds) <= 5_000);
  assert.ok(mock.callCount() > 0);
});

test("many first calls at once read Auth0's keys once", async () => {
  const before = tenant.jwksRequests;
  const tokens = await Promise.all(Array.from({ length: 20 }, (_, n) => signed({ jti: n })));
  assert.deepEqual(new Set(await Promise.all(tokens.map(statusOf))), new Set([200]));
  assert.equal(tenant.jwksRequests - before, 1);
});

test("known keys are used for ten minutes while Auth0 fails, and after that calls get 503", async (t) => {
  const pass = stopClock(t);
  assert.equal(await statusOf(await signed()), 200);
  tenant.answerJwks = fail;
  pass(9 * MINUTE);
  assert.equal(await statusOf(await signed()), 200);
  assert.equal(await statusOf(await signed({}, { kid: "made-up" })), 503, "a key that only Auth0 could know");
  assert.equal(await statusOf(await signed({ jti: 1 })), 200, "the known key goes on");
  pass(2 * MINUTE);
  assert.equal(await statusOf(await signed()), 503);
  tenant.answerJwks = undefined;
  assert.equal(await statusOf(await signed()), 200);
});

test("a withdrawn key is refused within eleven minutes, though a token of it is in use all the time", async (t) => {
  const pass = stopClock(t);
  const token = await signed();
  assert.equal(await statusOf(token), 200);
  await tenant.rotateKeys({ withdraw: true });
  for (let half = 1; half < 22; half++) {
    pass(MINUTE / 2);
    await statusOf(token);
  }
  pass(MINUTE / 2);
  assert.equal(await statusOf(token), 401);
});

test("a new key is accepted seconds after the keys were read, and the old one still is", async (t) => {
  const pass = stopClock(t);
  assert.equal(await statusOf(await signed()), 200);
  const old = await signed({ jti: "not seen before the rotation" }); // or it would be remembered
  await tenant.rotateKeys();
  pass(6_000);
  assert.equal(await statusOf(await signed()), 200);
  assert.equal(await statusOf(old), 200);
});

test("a token that names no key gets 401 while two keys are published", async () => {
  await tenant.rotateKeys();
  const reply = await send(await signed({}, { kid: undefined }));
  assert.equal(reply.status, 401);
  assert.match(reply.headers.get("www-authenticate") ?? "", /its kid is missing/);
});

test("a hundred made-up key ids in twenty seconds cause four requests to Auth0 at most", async (t) => {
  const pass = stopClock(t);
  assert.equal(await statusOf(await signed()), 200);
  const before = tenant.jwksRequests;
  for (let n = 0; n < 100; n++) {
    assert.equal(await statusOf(await signed({}, { kid: `made-up-${n}` })), 401);
    pass(200);
  }
  assert.ok(tenant.jwksRequests - before <= 4, `${tenant.jwksRequests - before} requests`);
});

test("a token refused as not valid yet is accepted once it is valid", async (t) => {
  const pass = stopClock(t);
  const token = await signed({ nbf: Math.floor(Date.now() / 1000) + 60 });
  assert.equal(await statusOf(token), 401);
  pass(MINUTE);
  assert.equal(await statusOf(token), 200);
});

test("at most ten thousand verified tokens are remembered, for a minute and never past their expiry", async (t) => {
  const pass = stopClock(t);
  const resource = { issuer: tenant.issuer, url: server.url, name: "Tasks", scopes: [] };
  const authenticate = createAuthenticator(resource);
  // Accepts every signature, so that ten thousand tokens need not be signed, and counts the verifications.
  const { mock } = t.mock.method(crypto.subtle, "verify", () => Promise.resolve(true));
  const [header, payload = ""] = (await signed()).split(".");
  const claims = JSON.parse(Buffer.from(payload, "base64url").toString());
  const token = (jti: number, exp: number = claims.exp) =>
    `Bearer ${header}.${Buffer.from(JSON.stringify({ ...claims, jti, exp })).toString("base64url")}.AAAA`;
  const isVerified = async (authorization: string) => {
    const before = mock.callCount();
    await authenticate(authorization);
    return mock.callCount() > before;
  };

  assert.equal(await isVerified(token(0)), true);
  pass(59_000);
  assert.equal(await isVerified(token(0)), false);
  pass(2_000);
  assert.equal(await isVerified(token(0)), true);

  const brief = token(1, Math.floor(Date.now() / 1000) + 30);
  assert.equal(await isVerified(brief), true);
  pass(32_000);
  assert.equal(await isVerified(brief), true); // within the tolerance between clocks, but checked again
  pass(10_000);
  await assert.rejects(isVerified(brief), { message: /expired/ });

  for (let n = 2; n < 10_002; n += 100) {
    await Promise.all(Array.from({ length: 100 }, (_, m) => authenticate(token(n + m))));
  }
  assert.equal(await isVerified(token(10_001)), false);
  assert.equal(await isVerified(token(0)), true, "the oldest have made room");
});
