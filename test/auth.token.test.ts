/** Which access tokens are accepted, and how the others are refused. */
import assert from "node:assert/strict";
import { createHmac, createPublicKey } from "node:crypto";
import { after, test } from "node:test";
import { CompactEncrypt, exportJWK, generateKeyPair, UnsecuredJWT } from "jose";
import { post, startServer } from "./support/server.ts";
import { configuredTenant, startTenant } from "./support/tenant.ts";

const tenant = await startTenant();
const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
Object.assign(tenant.settings, configuredTenant("permissive", server.url));

after(async () => {
  await server.close();
  await tenant.close();
});

const send = (token: string) => post(server.url, token, "ping");

async function assertAccepted(token: string) {
  const reply = await send(token);
  assert.equal(reply.status, 200, await reply.text());
}

/** Asserts a 401 whose challenge a client can parse, with this description, and without any part of the token. */
async function assertRefused(token: string, says: RegExp) {
  const reply = await send(token);
  const body = await reply.text();
  assert.equal(reply.status, 401, body);
  const challenge = reply.headers.get("www-authenticate") ?? "";
  // RFC 6750 §3: printable ASCII without quotes and backslashes.
  const form =
    /^Bearer error="invalid_token", error_description="([ !#-[\]-~]+)", resource_metadata="([^"]+)", scope="([^"]+)"$/;
  const [, description = "", metadata, scope] = form.exec(challenge) ?? assert.fail(challenge);
  assert.match(description, says);
  assert.equal(metadata, new URL("/.well-known/oauth-protected-resource/mcp", server.url).href);
  assert.equal(scope, "openid profile email offline_access");
  for (const part of token.split(".").filter((part) => part.length > 8)) {
    assert.ok(!(challenge + body).includes(part));
  }
}

const seconds = () => Math.floor(Date.now() / 1000);

test("both of Auth0's token profiles are accepted", async () => {
  await assertAccepted(await tenant.sign({ azp: "client" }, { header: { typ: "JWT" } }));
  const rfc9068 = { azp: undefined, client_id: "client", jti: "1" };
  await assertAccepted(await tenant.sign(rfc9068, { header: { typ: "at+jwt" } }));
  await assertAccepted(await tenant.sign(rfc9068, { header: { typ: "application/at+jwt" } }));
});

test("a token's audience may be an array that holds Auth0's userinfo, too", async () => {
  await assertAccepted(await tenant.sign({ aud: [server.url, `${tenant.issuer}userinfo`] }));
});

test("a few seconds between Auth0's clock and the server's are tolerated", async () => {
  await assertAccepted(await tenant.sign({ exp: seconds() - 2 }));
  await assertAccepted(await tenant.sign({ nbf: seconds() + 2 }));
});

test("the refusal of an encrypted token says to set the Default Audience", async () => {
  const token = await new CompactEncrypt(new TextEncoder().encode("{}"))
    .setProtectedHeader({ alg: "dir", enc: "A256GCM", iss: tenant.issuer }).encrypt(new Uint8Array(32));
  assert.equal(token.split(".").length, 5);
  await assertRefused(token, /encrypted.*5 parts.*Default Audience, README Step 2/);
});

test("the refusal of an opaque token says to set the Default Audience", async () => {
  await assertRefused("Zb1FJc9e8yQsk4wUQxsQ4kDRsGbzTfVx", /opaque.*Default Audience, README Step 2/);
});

test("a malformed token is refused", async () => {
  const [header, payload, signature] = (await tenant.sign()).split(".");
  await assertRefused("aaaaaaaaa.bbbbbbbbb.ccccccccc", /malformed/);
  await assertRefused(`${header}.${payload}.`, /malformed|signature/);
  await assertRefused(`${header}..${signature}`, /malformed|signature/);
  await assertRefused(`${header}.${payload}.${signature}, ${header}`, /malformed|opaque|encrypted/);
});

test("no algorithm but RS256 is accepted, however the token is signed", async () => {
  const claims = { iss: tenant.issuer, aud: server.url, sub: "auth0|eve", exp: seconds() + 60 };
  await assertRefused(new UnsecuredJWT(claims).encode(), /RS256.*README Step 1/);

  for (const alg of ["PS256", "ES256", "EdDSA"]) {
    const { privateKey } = await generateKeyPair(alg);
    await assertRefused(await tenant.sign({}, { header: { alg }, key: privateKey }), /RS256/);
  }
});

test("the public key is not accepted as an HMAC secret", async () => {
  const { keys: [jwk] } = await (await fetch(`${tenant.issuer}.well-known/jwks.json`)).json();
  const pem = createPublicKey({ key: jwk, format: "jwk" }).export({ type: "spki", format: "pem" });
  const [, payload] = (await tenant.sign()).split(".");
  const header = Buffer.from(JSON.stringify({ alg: "HS256", typ: "JWT", kid: jwk.kid })).toString("base64url");
  const signature = createHmac("sha256", pem).update(`${header}.${payload}`).digest("base64url");
  await assertRefused(`${header}.${payload}.${signature}`, /RS256/);
});

test("a key in the token's header is not used, and no URL in it is fetched", async () => {
  const { privateKey, publicKey } = await generateKeyPair("RS256");
  const jwk = { ...await exportJWK(publicKey), kid: "mine", alg: "RS256" };
  const requests = tenant.jwksRequests;
  const jku = `${tenant.issuer}.well-known/jwks.json?from=token`;
  await assertRefused(
    await tenant.sign({}, { header: { jwk, jku, x5u: jku, kid: "mine" }, key: privateKey }),
    /does not publish/,
  );
  await assertRefused(await tenant.sign({}, { header: { jwk, jku }, key: privateKey }), /signature/);
  assert.ok(tenant.jwksRequests - requests <= 1);
});

test("a token that was altered is refused", async () => {
  const [header, payload = "", signature] = (await tenant.sign()).split(".");
  const claims = JSON.parse(Buffer.from(payload, "base64url").toString());
  const altered = Buffer.from(JSON.stringify({ ...claims, sub: "auth0|bob" })).toString("base64url");
  await assertRefused(`${header}.${altered}.${signature}`, /signature/);
});

test("a token with an unknown critical header is refused", async () => {
  const [header = "", payload, signature] = (await tenant.sign()).split(".");
  const critical = { ...JSON.parse(Buffer.from(header, "base64url").toString()), crit: ["tenant"], tenant: "mine" };
  const altered = Buffer.from(JSON.stringify(critical)).toString("base64url");
  // The header is checked before the signature, which is wrong as well.
  await assertRefused(`${altered}.${payload}.${signature}`, /malformed/);
});

test("a token's issuer must match to the last slash", async () => {
  const withoutSlash = tenant.issuer.slice(0, -1);
  await assertRefused(
    await tenant.sign({ iss: withoutSlash }),
    new RegExp(`issuer ${withoutSlash}, expected ${tenant.issuer}: `),
  );
  await assertRefused(await tenant.sign({ iss: "https://other.auth0.com/" }), /AUTH0_DOMAIN/);
  await assertRefused(await tenant.sign({ iss: undefined }), /issuer \(none\), expected/);
});

test("the refusal of a token for another API names the expected audience", async () => {
  const expected = new RegExp(`expected ${server.url}.*README Step 1`);
  await assertRefused(await tenant.sign({ aud: "https://other.example/mcp" }), expected);
  await assertRefused(await tenant.sign({ aud: `${server.url}/` }), expected);
  await assertRefused(await tenant.sign({ aud: [] }), expected);
  await assertRefused(await tenant.sign({ aud: undefined }), expected);
});

test("the refusal of a token for Auth0's userinfo alone says to set the Default Audience", async () => {
  await assertRefused(await tenant.sign({ aud: `${tenant.issuer}userinfo` }), /userinfo.*README Step 2/);
  await assertRefused(await tenant.sign({ aud: [`${tenant.issuer}userinfo`] }), /userinfo.*README Step 2/);
});

test("an ID token is refused with the advice to send the access token", async () => {
  await assertRefused(
    await tenant.sign({ aud: "aBcDeFgHiJkL", scope: undefined, nonce: "n" }),
    /send the access token/,
  );
});

test("a token must expire, and must not have expired", async () => {
  await assertRefused(await tenant.sign({ exp: seconds() - 60 }), /expired/);
  await assertRefused(await tenant.sign({ exp: undefined }), /exp/);
  await assertRefused(await tenant.sign({ exp: "tomorrow" }), /exp/);
});

test("a token that is not valid yet is refused", async () => {
  await assertRefused(await tenant.sign({ nbf: seconds() + 60 }), /not valid yet/);
});

test("a token without a usable subject is refused", async () => {
  for (const sub of [undefined, "", 7, ["auth0|alice"], "auth0|\ud800", "auth0|a\0b"]) {
    await assertRefused(await tenant.sign({ sub }), /sub/);
  }
});

test("a claim that is quoted in a challenge cannot break its syntax", async () => {
  await assertRefused(await tenant.sign({ iss: "https://caf\u00e9.example/" }), /issuer https:\/\/caf\?\.example\/,/);
  await assertRefused(await tenant.sign({ iss: '", scope="\\\n\u2603' }), /issuer ', scope=''\?\?, expected/);
});

test("the profile takes only text from the token's claims, under their own name or a namespace", async () => {
  const claims = { name: 7, nickname: ["a"], "https://example.com/email": "half \ud83d", "x/name": "Mallory" };
  const reply = await post(server.url, await tenant.sign(claims), "tools/call", { name: "get_profile" });
  const { result } = await reply.json();
  assert.deepEqual(result.structuredContent, { id: "auth0|alice", email: "half \ufffd" });
});

test("another kind of JWT from the same keys is refused", async () => {
  for (const typ of ["logout+jwt", "dpop+jwt", "at+jwt+more"]) {
    await assertRefused(await tenant.sign({}, { header: { typ } }), /typ/);
  }
});

test("an expired token is refused even when it was accepted a moment ago", async (t) => {
  const token = await tenant.sign({ exp: seconds() + 30 });
  await assertAccepted(token);
  t.mock.timers.enable({ apis: ["Date"], now: Date.now() + 40_000 });
  await assertRefused(token, /expired/);
});
